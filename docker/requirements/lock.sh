#!/usr/bin/env bash
# Writes cpu.txt, server.txt, export.txt and gateway.txt: each package that an image installs, with its version and the hashes of its files.
set -euo pipefail
cd "$(dirname "$0")/../.."
uv=${UV:-uv}
folder=docker/requirements
# TensorRT for RTX wants another CUDA runtime than torch. The export image has torch alone.
pins=$(mktemp)
trap 'rm "$pins"' EXIT
grep -v '^nvidia-cuda-runtime' constraints.txt >"$pins"

# lock NAME PYTHON SOURCE...
lock() {
    "$uv" pip compile --quiet --generate-hashes --no-annotate --python-platform x86_64-manylinux_2_35 --python-version "$2" \
        --custom-compile-command "make lock" --output-file "$folder/$1.txt" "${@:3}"
}
lock cpu 3.11 "$folder/cpu.in"
lock server 3.12 "$folder/server.in"
lock export 3.12 --constraint "$pins" --extra export pyproject.toml "$folder/export.in"
lock gateway 3.11 --constraint "$pins" --extra gateway pyproject.toml "$folder/gateway.in"
