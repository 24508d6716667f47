# Sourced by the Android scripts: a JDK and Maven, and where their downloads are kept between clones.
# Environment: KEYDIFF_CACHE (default ~/.cache/keydiff-export).

need_apt() {
    local sudo=""
    [ "$(id -u)" -eq 0 ] || sudo="sudo"
    $sudo apt-get update -qq
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# need COMMAND PACKAGE...: installs packages unless the command is there.
need() {
    command -v "$1" >/dev/null && return
    command -v apt-get >/dev/null || { echo "android: $1 is missing and there is no apt-get: install ${*:2}" >&2; exit 2; }
    echo "android: installing ${*:2}"
    need_apt "${@:2}"
}

android_cache="${KEYDIFF_CACHE:-$HOME/.cache/keydiff-export}/android"

maven() {
    need javac openjdk-17-jdk-headless
    need mvn maven
    mvn --batch-mode --no-transfer-progress -Dmaven.repo.local="$android_cache/maven" -f android_app/pom.xml "$@"
}
