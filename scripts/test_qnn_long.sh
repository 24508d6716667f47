#!/usr/bin/env bash
# The demo model on the HTP emulator, a few layers and whole: hours on two cores. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
.venv/bin/python -m pytest -m qnn_long --timeout=36000 "$@"
