#!/usr/bin/env bash
# tools/bench/gpu_records.sh NIBBLE FOLDER
# On a machine with a GPU: runs what docs/benchmarks/gpu.md shows with the program NIBBLE (of `make
# bundle`) and leaves the records of each run in FOLDER. Then, in the repository, for each SHAPE:
#   tools/bench/gpu_page.py --join FOLDER/SHAPE-*.json > docs/benchmarks/GPU-SHAPE.json
# and at last tools/bench/gpu_page.py, which makes the page.
set -euo pipefail
nibble=$1
folder=$2
bench() {
  local shape=$1 name=$2
  shift 2
  "$nibble" bench --random "$shape" --device cuda "$@" --json "$folder/$shape-$name.json" \
    2>/dev/null
}
bench mistral-7b 1-figures --batches 1,2,4,8,16,32,64,128,256 --prompts 512,2048 \
  --kernels 1,8,64,256 --prompt-kernels 2048
bench mistral-7b 2-deep --batches 1 --depths 8192 --prompts 8192
bench mistral-7b 3-plain --fusion off --batches 1,8,64 --prompts 512,2048
bench mistral-7b 4-fusion --table autoawq --runs 1
bench mistral-7b 5-memory --batches 1 --depths 1920 --prompts 128 --max-step-tokens 512
bench llama-3-70b 1-figures --batches 1,16,64 --prompts 2048 --kernels 1,64 \
  --prompt-kernels 2048
