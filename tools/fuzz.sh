#!/usr/bin/env bash
# Builds every fuzz target with clang and libFuzzer and runs each for so many seconds.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds="${1:-30}"

cmake --preset fuzz
cmake --build --preset fuzz -j "$(nproc)"
findings="$PWD/build/fuzz/findings"
mkdir -p "$findings"
failed=0
for fuzzer in build/fuzz/bin/*_fuzz; do
  name="$(basename "$fuzzer" _fuzz)"
  work="build/fuzz/corpus/$name"
  mkdir -p "$work"
  echo "== $name, $seconds s"
  "$fuzzer" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=4096 -print_final_stats=0 \
    -verbosity=0 -artifact_prefix="$findings/$name-" "$work" "tests/fuzz/corpus/$name" || failed=1
done
[ "$failed" -eq 0 ] && echo "no findings" || echo "findings are in $findings"
exit "$failed"
