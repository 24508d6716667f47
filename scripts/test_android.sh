#!/usr/bin/env bash
# Tests of android_app: the engine core on the desktop JVM against `keydiff-export run`.
# Usage: bash scripts/test_android.sh [FOLDER]   FOLDER: graphs/smollm2-135m, exported; made here when it is not there.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/android_env.sh
bash scripts/setup.sh
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

demo="${1:-$work/demo}"
if [ ! -f "$demo/manifest.json" ]; then
    .venv/bin/keydiff-export export graphs/smollm2-135m --target onnx-cpu --no-validate -o "$demo"
fi
.venv/bin/python scripts/android_fixtures.py "$work" --demo "$demo"
maven --quiet verify -Dkeydiff.fixtures="$work/expected.json"
