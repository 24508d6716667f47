# shellcheck shell=bash
# Sourced by the Android scripts, from the root of the clone: a JDK, Maven and pinned files, kept between clones.
# Environment: KEYDIFF_CACHE (default ~/.cache/keydiff-export).

android_cache="${KEYDIFF_CACHE:-$HOME/.cache/keydiff-export}/android"
mkdir -p "$android_cache"

# need COMMAND PACKAGE...: installs packages unless the command is there.
need() {
    command -v "$1" >/dev/null && return
    command -v apt-get >/dev/null || { echo "android: $1 is missing and there is no apt-get: install ${*:2}" >&2; exit 2; }
    echo "android: installing ${*:2}" >&2
    local sudo=""
    [ "$(id -u)" -eq 0 ] || sudo="sudo"
    $sudo apt-get update -qq >&2
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${@:2}" >/dev/null
}

# maven ARGUMENT...: Maven on android_app, with its downloads in the cache.
maven() {
    need javac openjdk-17-jdk-headless
    need mvn maven
    mvn --batch-mode --no-transfer-progress -Dmaven.repo.local="$android_cache/maven" -f android_app/pom.xml "$@"
}

# pinned NAME: the path of a file of android_app/pinned.txt, fetched once and checked against its SHA-256.
pinned() {
    local source coordinates checksum file fresh
    read -r _ source coordinates checksum < <(grep "^$1 " android_app/pinned.txt)
    case "$source" in maven) file="${coordinates##*:}" ;; *) file=tgz ;; esac
    file="$android_cache/pinned/$checksum.$file"
    if [ ! -f "$file" ]; then
        fresh="$(mktemp -d "$android_cache/fetch.XXXX")"
        if [ "$source" = maven ]; then
            maven --quiet --non-recursive org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy \
                -Dartifact="$coordinates" -DoutputDirectory="$fresh" >&2
        else
            need npm npm
            npm pack --silent --pack-destination "$fresh" "$coordinates" >&2
        fi
        if ! echo "$checksum  $(echo "$fresh"/*)" | sha256sum --check --status; then
            echo "android: $coordinates does not have the SHA-256 that android_app/pinned.txt names" >&2
            exit 1
        fi
        mkdir -p "$android_cache/pinned"
        mv "$fresh"/* "$file"
        rmdir "$fresh"
    fi
    echo "$file"
}

# android_libraries: a folder with classes/*.jar and lib/ABI/*.so of both engines, made once.
android_libraries() {
    local folder key fresh
    need unzip unzip
    key="$(cat android_app/pinned.txt scripts/android_env.sh | sha256sum | cut -c1-16)"
    folder="$android_cache/libraries-$key"
    if [ ! -d "$folder" ]; then
        fresh="$(mktemp -d "$android_cache/libraries.XXXX")"
        mkdir -p "$fresh/classes" "$fresh/lib"
        tar -xzf "$(pinned onnxruntime)" -C "$fresh" package/Plugins/Android/onnxruntime.aar
        unzip -q "$fresh/package/Plugins/Android/onnxruntime.aar" -d "$fresh/onnxruntime"
        tar -xzf "$(pinned executorch)" -C "$fresh" package/android/libs/classes.jar package/third-party/android/libs/executorch
        unzip -q "$(pinned fbjni)" -d "$fresh/fbjni"
        cp "$fresh/onnxruntime/classes.jar" "$fresh/classes/onnxruntime.jar"
        cp "$fresh/package/android/libs/classes.jar" "$fresh/classes/executorch.jar"
        cp "$fresh/fbjni/classes.jar" "$fresh/classes/fbjni.jar"
        cp "$(pinned nativeloader)" "$fresh/classes/nativeloader.jar"
        for abi in arm64-v8a x86_64; do
            mkdir "$fresh/lib/$abi"
            cp "$fresh/onnxruntime/jni/$abi"/*.so "$fresh/fbjni/jni/$abi"/*.so \
                "$fresh/package/third-party/android/libs/executorch/$abi"/*.so "$fresh/lib/$abi"
        done
        rm -rf "$fresh/package" "$fresh/onnxruntime" "$fresh/fbjni"
        mv "$fresh" "$folder"
    fi
    echo "$folder"
}
