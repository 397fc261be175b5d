#!/usr/bin/env bash
# Packs what a GPU machine with torch but without a network often lacks: Hydra and pydantic, in the versions of
# constraints.txt. FAISS is not among them: without it the search is torch's.
#
#   scripts/gpu_packages.sh FILE.tar.xz        here
#   tar -C DIR -xf FILE.tar.xz                 there, and PYTHONPATH=DIR in its environment
#
# VERSION=3.12             of the Python there, on x86-64 Linux
# PYTHON=.venv/bin/python
set -euo pipefail
file=$(realpath "${1:?where to, say packages.tar.xz}")
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

pinned() { grep -iE "^($1)==" constraints.txt; }
# shellcheck disable=SC2046  # each pin is a word
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$work" $(pinned 'hydra-core|omegaconf|antlr4-python3-runtime')
# shellcheck disable=SC2046
"$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$work" --python-version "${VERSION:-3.12}" \
    --implementation cp --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    $(pinned 'pydantic|pydantic[-_]core|annotated[-_]types|typing[-_]inspection|typing[-_]extensions')
for wheel in "$work"/*.whl; do "$python" -m zipfile -e "$wheel" "$work/site"; done
tar -C "$work/site" -cJf "$file" .
