#!/usr/bin/env bash
# tools/bench/gpu_records.sh NIBBLE FOLDER
# On a machine with a GPU: runs what docs/benchmarks/gpu.md shows with the program NIBBLE (of `make
# bundle`) and leaves the records of each run in FOLDER. Then, in the repository:
#   python3 tools/bench/gpu_page.py --join FOLDER/*.json > docs/benchmarks/h200-mistral-7b.json
#   python3 tools/bench/gpu_page.py
set -euo pipefail
nibble=$1
folder=$2
bench() {
  local name=$1
  shift
  "$nibble" bench --random mistral-7b --device cuda "$@" --json "$folder/$name.json" 2>/dev/null
}
bench 1-figures --batches 1,2,4,8,16,32,64,128,256 --prompts 512,2048 --kernels 1,8,64,256 \
  --prompt-kernels 2048
bench 2-deep --batches 1 --depths 8192 --prompts 8192
bench 3-plain --fusion off --batches 1,8,64 --prompts 512,2048
bench 4-fusion --table autoawq --runs 1
bench 5-memory --batches 1 --depths 1920 --prompts 128 --max-step-tokens 512
