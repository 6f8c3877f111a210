#!/bin/sh
# Assembles a CUDA 13.0 toolkit from Python wheels into third_party/cuda, where there is none on
# the machine: enough to compile and link, without a GPU or root.
set -eu
cd "$(dirname "$0")/.."
folder=third_party/cuda
if [ -x "$folder/toolkit/bin/nvcc" ]; then
  exit 0
fi
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet \
  nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
  nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
root=$(echo "$PWD/$folder"/venv/lib/python3*/site-packages/nvidia/cu13)
ln -sfn lib "$root/lib64"
ln -sf libcudart.so.13 "$root/lib/libcudart.so"
ln -sfn "$root" "$folder/toolkit"
"$folder/toolkit/bin/nvcc" --version | tail -n 2
