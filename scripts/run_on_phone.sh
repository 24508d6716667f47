#!/usr/bin/env bash
# Runs an exported executorch-qnn artifact on a phone by adb: pushes program, libraries and runner, runs one prefill step
# on fixed inputs, pulls outputs and logs, and compares the outputs with the emulator's and with parity.json.
#
#   scripts/run_on_phone.sh [--dry-run] [--serial S] EXPORTED_FOLDER QNN_SDK RUNNER
#
# EXPORTED_FOLDER  made with --target executorch-qnn --compile
# QNN_SDK          an unpacked QNN SDK whose version is the one that compiled the artifact (docs/qnn.md)
# RUNNER           qnn_executor_runner for arm64, built from ExecuTorch (docs/qnn.md)
# --dry-run        checks every file and prints the adb commands without a phone
set -euo pipefail

here="$(cd "$(dirname "$0")/.." && pwd)"
python="${PYTHON:-$here/.venv/bin/python}"
dry=""
serial=()

usage() { sed -n '2,11s/^# \{0,1\}//p' "$0"; }
fail() {
    echo "run_on_phone: $1" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case "$1" in
        --dry-run) dry=1 ;;
        --serial)
            [ $# -ge 2 ] || fail "--serial needs the phone's serial number (adb devices)"
            serial=(-s "$2")
            shift
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        -*) fail "unknown option $1 (see --help)" ;;
        *) break ;;
    esac
    shift
done
[ $# -eq 3 ] || fail "needs EXPORTED_FOLDER, QNN_SDK and RUNNER (see --help)"
folder="$1" sdk="$2" runner="$3"

program="$folder/executorch-qnn/phone/model.pte"
[ -f "$folder/manifest.json" ] || fail "$folder is not an exported folder: manifest.json is missing"
[ -f "$program" ] || fail "$program is missing: export with --target executorch-qnn --compile"
[ -f "$folder/parity.json" ] || fail "$folder/parity.json is missing: run keydiff-export validate $folder first"
[ -f "$runner" ] || fail "runner $runner is missing: build it as docs/qnn.md says"

soc="$(sed -n 's/.*"soc": "\(SM[0-9]*\)".*/\1/p' "$folder/manifest.json" | head -n 1)"
case "$soc" in
    SM8650) arch=75 ;;
    SM8750) arch=79 ;;
    SM8850) arch=81 ;;
    *) fail "$folder/manifest.json names no chip that this script knows (found '$soc')" ;;
esac
android="$sdk/lib/aarch64-android"
skel="$sdk/lib/hexagon-v$arch/unsigned/libQnnHtpV${arch}Skel.so"
libraries=("$android/libQnnHtp.so" "$android/libQnnSystem.so" "$android/libQnnHtpV${arch}Stub.so" "$skel")
for file in "${libraries[@]}"; do
    [ -f "$file" ] || fail "$file is missing: $sdk is not a QNN SDK with Android libraries"
done
backend="$(dirname "$runner")/libqnn_executorch_backend.so"
[ -f "$backend" ] && libraries+=("$backend")

device=/data/local/tmp/keydiff-export
results="$folder/phone-results"

phone() {
    if [ -n "$dry" ]; then
        printf 'adb'
        [ ${#serial[@]} -eq 0 ] || printf ' %q' "${serial[@]}"
        printf ' %q' "$@"
        printf '\n'
    else
        adb ${serial[@]+"${serial[@]}"} "$@"
    fi
}

if [ -z "$dry" ]; then
    command -v adb >/dev/null || fail "adb is missing: install Android's platform-tools"
    adb ${serial[@]+"${serial[@]}"} get-state >/dev/null 2>&1 || fail "no phone answers adb: see adb devices"
    found="$(adb ${serial[@]+"${serial[@]}"} shell getprop ro.soc.model | tr -d '\r')"
    [ "$found" = "$soc" ] || fail "the phone is a $found and the artifact is compiled for $soc: export with --soc $found"
fi

inputs="$(mktemp -d)"
trap 'rm -rf "$inputs"' EXIT
method="$("$python" "$here/scripts/phone_step.py" inputs "$folder" "$inputs" | tail -n 1)"

phone shell mkdir -p "$device/outputs"
phone push "$program" "$runner" "${libraries[@]}" "$device/"
for file in "$inputs"/*; do
    phone push "$file" "$device/$(basename "$file")"
done
phone shell "cd $device && chmod +x $(basename "$runner") && LD_LIBRARY_PATH=. ADSP_LIBRARY_PATH=. \
./$(basename "$runner") --model_path model.pte --method_index $method --input_list_path input_list.txt \
--output_folder_path outputs > run.log 2>&1; echo exit code \$? >> run.log"
if [ -n "$dry" ]; then
    phone pull "$device/outputs" "$results/"
    phone pull "$device/run.log" "$results/"
    echo "python scripts/phone_step.py compare $folder $results"
    exit 0
fi
mkdir -p "$results"
phone pull "$device/outputs" "$results/"
phone pull "$device/run.log" "$results/"
"$python" "$here/scripts/phone_step.py" compare "$folder" "$results"
