#!/bin/sh
# Installs what the tests need and runs them all: ./test.sh [pytest arguments]
set -eu
cd "$(dirname "$0")"

# The NEON kernels are compiled for aarch64 and run under qemu.
if ! command -v aarch64-linux-gnu-g++ >/dev/null || ! command -v qemu-aarch64 >/dev/null; then
    sudo=$([ "$(id -u)" = 0 ] || echo sudo)
    $sudo apt-get update -qq
    $sudo env DEBIAN_FRONTEND=noninteractive \
        apt-get install -qq -y --no-install-recommends g++-aarch64-linux-gnu qemu-user >/dev/null
fi

./install.sh dev
# Optimum asks for an older transformers than the tests, so it lies beside, for tests/test_optimum.py.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
    --target .venv/optimum -r tests/optimum.txt
exec .venv/bin/pytest "$@"
