#!/usr/bin/env bash
# Runs tiny exported .onnx files with ONNX Runtime's ARM64 kernels under qemu, on two models of phone processors (one
# without and one with the dot-product instructions), and compares with x86 and with the eager reference.
# Needs Debian (apt has the ARM64 packages of the same release there).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/android_env.sh
bash scripts/setup.sh
need qemu-aarch64-static qemu-user-static
need dpkg dpkg
python=.venv/bin/python
# The newest release that qemu 7.2 can load; 1.28, 1.29 and 1.31 crash while they look at the processor.
ort=1.26.0
. /etc/os-release
root="$android_cache/arm64-$VERSION_CODENAME-$ort-$(sha256sum scripts/arm64_parity.sh | cut -c1-8)"

if [ ! -d "$root" ]; then
    fresh="$(mktemp -d "$android_cache/arm64.XXXX")"
    mkdir -p "$fresh/apt/lists/partial" "$fresh/apt/cache/archives/partial" "$fresh/debs"
    touch "$fresh/apt/status"
    # A state of its own: the machine's packages are left alone.
    cat >"$fresh/apt/conf" <<CONF
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
Dir::State "$fresh/apt";
Dir::State::status "$fresh/apt/status";
Dir::Cache "$fresh/apt/cache";
APT::Sandbox::User "root";
CONF
    export APT_CONFIG="$fresh/apt/conf"
    apt-get update -qq
    version="$(apt-cache depends python3-minimal | sed -n 's/.*Depends: python\(3\.[0-9]*\)-minimal.*/\1/p' | head -n 1)"
    (cd "$fresh/debs" && apt-get download -qq libc6 libgcc-s1 libstdc++6 zlib1g libexpat1 libffi8 libbz2-1.0 liblzma5 \
        "python$version-minimal" "libpython$version-minimal" "libpython$version-stdlib")
    unset APT_CONFIG
    for package in "$fresh"/debs/*.deb; do dpkg -x "$package" "$fresh"; done
    "$(cat .venv/packages)/bin/python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
        -d "$fresh/debs" "onnxruntime==$ort" "numpy==2.2.6"
    mkdir "$fresh/site"
    for wheel in "$fresh"/debs/*.whl; do $python -m zipfile -e "$wheel" "$fresh/site"; done
    echo "python$version" >"$fresh/python"
    rm -rf "$fresh/apt" "$fresh/debs"
    mv "$fresh" "$root"
fi

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
$python scripts/arm64_compare.py --prepare "$work"
for cpu in cortex-a53 cortex-a76; do
    for list in "$work"/*.arguments; do
        mapfile -t arguments < <(sed "s/MACHINE/$cpu/" "$list")
        qemu-aarch64-static -cpu "$cpu" -L "$root" -E PYTHONPATH="$root/site" -E PYTHONHOME="$root/usr" \
            -E PYTHONDONTWRITEBYTECODE=1 "$root/usr/bin/$(cat "$root/python")" "${arguments[@]}"
    done
done
$python scripts/arm64_compare.py "$work" cortex-a53 cortex-a76
