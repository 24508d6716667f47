#!/usr/bin/env bash
# Everything that CI checks: lint, types, tests, and those of the Android app.
# Arguments go to pytest, e.g. `scripts/test.sh -k parity`; the app is then left out.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m mypy
if [ $# -gt 0 ]; then
    exec .venv/bin/python -m pytest "$@"
fi
# The demo card is exported once, by its tests, and handed on.
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
# Two files of tests at a time, in the order of their names: the demo card comes before the short ones.
KEYDIFF_DEMO_EXPORT="$work/demo" .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
bash scripts/test_android.sh "$work/demo"
