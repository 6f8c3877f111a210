#!/usr/bin/env bash
# Measures the demo's model on this machine; the numbers also go to build/bench.json.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup build
cmake --preset release >/dev/null
cmake --build --preset release -j "$(nproc)" --target nibble
models="$PWD/.cache/models"
bash tools/models/fetch_demo_model.sh "$models/smollm2-135m"
[ -e "$models/smollm2-135m-awq/config.json" ] ||
  build/release/bin/nibble quantize --method rtn --group-size 64 \
    "$models/smollm2-135m" "$models/smollm2-135m-awq"
build/release/bin/nibble bench "$models/smollm2-135m-awq" --json build/bench.json "$@"
