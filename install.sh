#!/bin/sh
# Sets up edgevlm in .venv beside this file: ./install.sh, or with extras: ./install.sh dev for the
# tests too, ./install.sh bench for llama.cpp's own multimodal path to measure against.
# Needs Python 3.10-3.13 with venv, and g++. $PYTHON chooses the interpreter.
set -eu
cd "$(dirname "$0")"

fail() {
    echo "install.sh: $1" >&2
    exit 1
}

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "no $python here: install Python 3.10 or newer"
command -v g++ >/dev/null || fail "no C++ compiler here: on Debian, apt install g++"
[ -x .venv/bin/python ] || "$python" -m venv .venv ||
    fail "Python cannot make a virtual environment: on Debian, apt install python3-venv"

pip() {
    .venv/bin/python -m pip --quiet --disable-pip-version-check "$@"
}

mtmd=OFF
again=
case ",${1:-}," in
*,bench,*)
    mtmd=ON
    # pip would keep the library that it has, or that it compiled before, without libmtmd
    ls .venv/lib/python3.*/site-packages/llama_cpp/lib/libmtmd.* >/dev/null 2>&1 ||
        again="--force-reinstall --no-deps --no-cache-dir"
    ;;
esac

echo "install.sh: compiling llama.cpp, which comes as source; this takes two minutes or so" >&2
# shellcheck disable=SC2086 # $again is words
CMAKE_ARGS="-DEDGEVLM_MTMD=$mtmd -DCMAKE_PROJECT_INCLUDE=$PWD/cmake/llama-cpp.cmake" \
    pip install $again llama-cpp-python==0.3.36
pip install ".${1:+[$1]}"
echo "install.sh: done; try .venv/bin/edgevlm describe examples/cat.jpg" >&2
