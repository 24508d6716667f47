#!/usr/bin/env bash
# Tests of android_app: the engine core on the desktop JVM against `keydiff-export run`, the screen under Robolectric,
# the APK built and checked, and ARM64 kernels under qemu.
# Usage: bash scripts/test_android.sh [FOLDER]   FOLDER: graphs/smollm2-135m, exported; made here when it is not there.
# Environment: PICTURES, a folder that receives the screen as PNG.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/android_env.sh
bash scripts/setup.sh
libraries="$(android_libraries)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

demo="${1:-$work/demo}"
if [ ! -f "$demo/manifest.json" ]; then
    .venv/bin/keydiff-export export graphs/smollm2-135m --target onnx-cpu --no-validate -o "$demo"
fi
.venv/bin/python scripts/android_fixtures.py "$work/fixtures" --demo "$demo"
maven --quiet verify -Dkeydiff.fixtures="$work/fixtures/expected.json" \
    -Dkeydiff.executorch="$libraries/classes/executorch.jar" -Dkeydiff.pictures="${PICTURES:-}"
PROGRAM="$(find "$demo" -name '*.pte' | head -n 1)" bash scripts/build_apk.sh "$work/app.apk"
if grep -q '^ID=debian' /etc/os-release; then
    bash scripts/arm64_parity.sh
else
    echo "test_android: ARM64 parity is left out: scripts/arm64_parity.sh needs Debian"
fi
