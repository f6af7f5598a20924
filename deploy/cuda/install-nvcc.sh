#!/usr/bin/env bash
# Puts a CUDA 13.0 compiler (nvcc and the headers that kernels include) into one folder, from pinned packages of the Python
# Package Index. It is no full toolkit: no libraries to link with, since the driver and cuBLAS are loaded at run time.
#
# usage: deploy/cuda/install-nvcc.sh [FOLDER]      default: .tools/cuda of the repository, where the build looks by itself
#        Elsewhere, build with CUDA_HOME=FOLDER. Needs python3 with pip; about 250 MB on disk.
set -euo pipefail

repository=$(cd "$(dirname "$0")/../.." && pwd)
folder=${1:-$repository/.tools/cuda}
packages=(
  nvidia-cuda-nvcc==13.0.88
  nvidia-nvvm==13.0.88
  nvidia-cuda-crt==13.0.88
  nvidia-cuda-runtime==13.0.96
  nvidia-cuda-cccl==13.0.85
)

if [ -x "$folder/bin/nvcc" ]; then
  echo "$folder/bin/nvcc is there already"
  exit 0
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m pip install --quiet --no-deps --no-compile --only-binary=:all: --target "$scratch" "${packages[@]}"
mkdir -p "$(dirname "$folder")"
rm -rf "$folder"
# All five packages unpack below one folder that has the layout of a toolkit: bin, nvvm, include.
mv "$scratch/nvidia/cu13" "$folder"
chmod +x "$folder"/bin/* "$folder"/nvvm/bin/*
"$folder/bin/nvcc" --version | tail -n 2
