#!/usr/bin/env bash
# Packs the packages that a GPU machine with torch but without a network often lacks: Hydra and pydantic, in the versions
# of constraints.txt. FAISS is not included; without it the search uses torch.
#
#   scripts/gpu_packages.sh FILE.tar.xz        on this machine
#   tar -C DIR -xf FILE.tar.xz                 on the GPU machine; then set PYTHONPATH=DIR there
#
# Environment variables:
# VERSION=3.12             the Python version on the GPU machine, which must be x86-64 Linux
# PYTHON=.venv/bin/python  the Python interpreter on this machine
set -euo pipefail
file=$(realpath "${1:?where to, say packages.tar.xz}")
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

pinned() { grep -iE "^($1)==" constraints.txt; }
# shellcheck disable=SC2046  # each pinned package is one word
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$work" $(pinned 'hydra-core|omegaconf|antlr4-python3-runtime')
# shellcheck disable=SC2046
"$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$work" --python-version "${VERSION:-3.12}" \
    --implementation cp --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    $(pinned 'pydantic|pydantic[-_]core|annotated[-_]types|typing[-_]inspection|typing[-_]extensions')
for wheel in "$work"/*.whl; do "$python" -m zipfile -e "$wheel" "$work/site"; done
tar -C "$work/site" -cJf "$file" .
