#!/usr/bin/env bash
# Runs tiny exported .pte and .onnx files with the ARM64 kernels of ExecuTorch and ONNX Runtime under qemu, on two models
# of phone processors (one without and one with the dot-product instructions), and compares with x86 and with the eager
# reference. Needs Debian (apt has the ARM64 packages of the same release there).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/android_env.sh
bash scripts/setup.sh
need dpkg dpkg
need aarch64-linux-gnu-g++ g++-aarch64-linux-gnu
python=.venv/bin/python
# qemu 7.2, Debian 12's own, shows programs the desktop's /proc/cpuinfo: torch and ONNX Runtime 1.28 and newer crash on it.
qemu_release=trixie
. /etc/os-release
root="$android_cache/arm64-$VERSION_CODENAME-$(cat requirements.lock scripts/arm64_{parity.sh,stubs.py,operator.cpp} | sha256sum | cut -c1-16)"

# locked PACKAGE: PACKAGE==VERSION as on x86.
locked() { sed -n "s/^\($1==[^ ]*\).*/\1/p" requirements.lock; }

if [ ! -d "$root" ]; then
    echo "arm64_parity: fetching ARM64 packages (about 600 MB, once)"
    fresh="$(mktemp -d "$android_cache/arm64.XXXX")"
    mkdir -p "$fresh/apt/lists/partial" "$fresh/apt/cache/archives/partial" "$fresh/debs" "$fresh/qemu"
    touch "$fresh/apt/status"
    # A state of its own: the machine's packages are left alone. Signatures are checked with the machine's keys.
    mirror="$(apt-get indextargets --format "\$(REPO_URI)" "Created-By: Packages" | grep -v security | head -n 1)"
    host="$(dpkg --print-architecture)"
    for suite in "$VERSION_CODENAME" "$qemu_release"; do echo "deb $mirror $suite main"; done | sort -u >"$fresh/apt/sources"
    cat >"$fresh/apt/conf" <<CONF
APT::Architecture "arm64";
APT::Architectures { "arm64"; "$host"; };
APT::Default-Release "$VERSION_CODENAME";
Dir::Etc::SourceList "$fresh/apt/sources";
Dir::Etc::SourceParts "/dev/null";
Dir::State "$fresh/apt";
Dir::State::status "$fresh/apt/status";
Dir::Cache "$fresh/apt/cache";
APT::Sandbox::User "root";
CONF
    export APT_CONFIG="$fresh/apt/conf"
    apt-get update -qq
    version="$(apt-cache depends python3-minimal | sed -n 's/.*Depends: python\(3\.[0-9]*\)-minimal.*/\1/p' | head -n 1)"
    (cd "$fresh/debs" && apt-get download -qq libc6 libgcc-s1 libstdc++6 libatomic1 zlib1g libexpat1 libffi8 libbz2-1.0 \
        liblzma5 libssl3 "python$version-minimal" "libpython$version-minimal" "libpython$version-stdlib")
    (cd "$fresh/qemu" && apt-get download -qq "qemu-user:$host/$qemu_release")
    unset APT_CONFIG
    for package in "$fresh"/debs/*.deb; do dpkg -x "$package" "$fresh"; done
    dpkg -x "$fresh"/qemu/*.deb "$fresh/qemu"
    mv "$fresh/qemu/usr/bin/qemu-aarch64" "$fresh/qemu-aarch64"
    packages="$(cat .venv/packages)"
    "$packages/bin/python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
        -d "$fresh/debs" "$(locked torch)" "$(locked executorch)" "$(locked onnxruntime)" "$(locked numpy)"
    mkdir "$fresh/site"
    for wheel in "$fresh"/debs/*.whl; do $python -m zipfile -e "$wheel" "$fresh/site"; done
    # What torch imports is plain Python.
    for module in filelock typing_extensions.py sympy mpmath networkx jinja2 markupsafe fsspec; do
        cp -r "$("$packages/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/$module" "$fresh/site"
    done
    $python scripts/arm64_stubs.py "$fresh/site/torch/lib" "$fresh/stubs"
    headers="$fresh/site/executorch/include"
    aarch64-linux-gnu-g++ -std=c++17 -O2 -shared -fPIC -DC10_USING_CUSTOM_GENERATED_MACROS -I"$headers" \
        -I"$headers/executorch/runtime/core/portable_type/c10" scripts/arm64_operator.cpp \
        -L"$fresh/site/executorch/lib" -lexecutorch -o "$fresh/operator.so"
    echo "python$version" >"$fresh/python"
    rm -rf "$fresh/apt" "$fresh/debs" "$fresh/qemu"
    mv "$fresh" "$root"
fi

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
$python scripts/arm64_compare.py --prepare "$work"
# The Linux library of ExecuTorch's LLM operators is compiled for ARMv8.1, which a Cortex-A53 is not.
declare -A operator=([cortex-a53]="$root/operator.so" [cortex-a76]="")
waiting=()
for cpu in cortex-a53 cortex-a76; do
    "$root/qemu-aarch64" -cpu "$cpu" -L "$root" -E PYTHONPATH="$root/site" -E PYTHONHOME="$root/usr" \
        -E LD_LIBRARY_PATH="$root/stubs" -E PYTHONDONTWRITEBYTECODE=1 -E OMP_NUM_THREADS=1 \
        "$root/usr/bin/$(cat "$root/python")" scripts/arm64_steps.py "$work" "$cpu" "${operator[$cpu]}" 2>"$work/$cpu.log" &
    waiting+=($!)
done
for process in "${waiting[@]}"; do wait "$process" || { tail -n 20 "$work"/cortex-*.log >&2; exit 1; }; done
$python scripts/arm64_compare.py "$work" cortex-a53 cortex-a76
