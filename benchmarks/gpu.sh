#!/usr/bin/env bash
# The GPU kit on a machine that has a Python with CUDA's torch, transformers, lightning and peft, and perhaps no network.
#
#   benchmarks/gpu.sh wheels        with a network: pure-Python wheels into build/gpu/wheels, to be carried along
#   benchmarks/gpu.sh [PART ...]    what gpu.py takes; packages that are missing are unpacked from those wheels first,
#                                   into a folder of their own: what the machine has is neither changed nor replaced
#
# PYTHON=python3.12 picks the Python. COMPILED='pyarrow' FOR=3.12 adds wheels with compiled parts for that Python.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$here")"
python="${PYTHON:-python3}"
[[ "$python" == */* && "$python" != /* ]] && python="$PWD/$python"
wheels="$root/build/gpu/wheels"
cd "$here" # not where select.py is

version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 11))')" ||
    { echo "error: Python 3.11 or newer is needed, $python is ${version:-missing}: set PYTHON" >&2; exit 2; }

listed() { grep -v '^#' gpu-wheels.txt; }

if [[ "${1:-}" == wheels ]]; then
    rm -rf "$wheels"
    mkdir -p "$wheels"
    pip=("$python" -m pip --disable-pip-version-check -q)
    listed | cut -d' ' -f1 | grep -v '^multiprocess' |
        xargs "${pip[@]}" wheel --no-deps -c "$root/constraints.txt" -w "$wheels"
    for each in 3.11 3.12 3.13; do # has a wheel for each Python
        "${pip[@]}" download --no-deps --only-binary=:all: --python-version "$each" -c "$root/constraints.txt" -d "$wheels" multiprocess
    done
    for each in ${COMPILED:-}; do
        "${pip[@]}" download --no-deps --only-binary=:all: --python-version "${FOR:-$version}" --implementation cp \
            --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
            -c "$root/constraints.txt" -d "$wheels" "$each"
    done
    for wheel in "$wheels"/*.whl; do
        [[ "$wheel" == *-none-any.whl || -n "${COMPILED:-}" ]] ||
            { echo "error: $(basename "$wheel") has compiled parts: name it in COMPILED" >&2; exit 1; }
    done
    echo "$(ls "$wheels" | wc -l) wheels, $(du -sm "$wheels" | cut -f1) MiB in build/gpu/wheels"
    exit 0
fi

missing() { # requirements among those given on standard input whose module is not there
    "$python" -c '
import importlib.util, sys
for line in sys.stdin:
    requirement, module = line.split()
    if importlib.util.find_spec(module) is None:
        print(requirement)'
}

# one for each Python, as each lacks other packages
site="$root/build/gpu/site-$version-$("$python" -c 'import sys, zlib; print("%08x" % zlib.crc32(sys.prefix.encode()))')"
export PYTHONPATH="$root/src:$site${PYTHONPATH:+:$PYTHONPATH}"
absent="$({ listed; for each in ${COMPILED:-}; do echo "$each $each"; done; } | missing)"
if [[ -d "$wheels" ]]; then
    for each in $absent; do
        "$python" -m pip install -qq --disable-pip-version-check --no-index --no-deps --no-compile --find-links "$wheels" \
            --target "$site" "$each" || echo "no wheel of $each for Python $version in build/gpu/wheels" >&2
    done
fi
# no part runs without these
needed="$(printf '%s\n' 'torch torch' 'transformers transformers' 'numpy numpy' 'pyarrow pyarrow' 'tokenizers tokenizers' \
    'safetensors safetensors' 'PyYAML yaml' 'lightning lightning' 'peft peft' 'hydra-core hydra' 'omegaconf omegaconf' \
    'tabulate tabulate' 'filelock filelock' | missing | paste -sd' ')"
if [[ -n "$needed" ]]; then
    echo "error: missing here: $needed; make gpu-wheels on a machine with a network brings what is pure Python, and" \
        "COMPILED='pyarrow' FOR=$version what is not, into build/gpu/wheels" >&2
    exit 2
fi
exec "$python" gpu.py "$@"
