#!/usr/bin/env bash
# From nothing to a streamed answer: sets up, builds, fetches a small real model, quantizes it,
# serves it on two CPU ranks, asks a question, shows what it cost, and shuts down.
set -euo pipefail
cd "$(dirname "$0")/.."

question="${1:-Why is the sky blue?}"
models="$PWD/.cache/models"
bin="$PWD/build/release/bin"
fp16="$models/smollm2-135m"
awq="$models/smollm2-135m-awq"
ready_seconds_max=120

began=$SECONDS
step() { printf '\n[%3d s] %s\n' "$((SECONDS - began))" "$*"; }
die() { printf 'demo: %s\n' "$*" >&2; exit 1; }

step "setting up what the build needs"
tools/setup build

step "building the programs (the longest step)"
mkdir -p build
cmake --preset release >build/demo-configure.log 2>&1 || { cat build/demo-configure.log; exit 1; }
cmake --build --preset release -j "$(nproc)" --target nibble nibble-worker nibble-gateway

step "fetching SmolLM2-135M-Instruct"
bash tools/models/fetch_demo_model.sh "$fp16"

if [ ! -e "$awq/config.json" ]; then
  step "quantizing it to 4 bits: round to nearest, groups of 64"
  "$bin/nibble" quantize --method rtn --group-size 64 "$fp16" "$awq"
fi

step "serving it on two ranks"
announce="$(mktemp)"
rm -f "$announce"
"$bin/nibble" serve "$awq" --tp 2 --context 2048 --max-sequences 16 --port 0 \
  --metrics-listen 127.0.0.1:0 --worker-metrics-listen 127.0.0.1:0 \
  --announce "$announce" --log-level warn &
server=$!
cleanup() {
  kill "$server" 2>/dev/null || true
  rm -f "$announce"
}
trap cleanup EXIT
for ((tenths = 0; tenths < ready_seconds_max * 10; ++tenths)); do
  [ -s "$announce" ] && break
  kill -0 "$server" 2>/dev/null || die "the server ended before it was ready"
  sleep 0.1
done
[ -s "$announce" ] || die "the server was not ready within $ready_seconds_max s"
address_of() {
  python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$announce" "$1"
}

step "asking: $question"
"$bin/nibble" chat --server "$(address_of grpc)" --max-tokens 96 --temperature 0 --stats "$question"

step "what that caused, as Prometheus sees it"
python3 tools/show_metrics.py "$(address_of metrics)" "$(address_of worker_metrics)"

step "shutting down"
kill -TERM "$server"
wait "$server" || die "the server ended with exit code $?"
trap - EXIT
rm -f "$announce"
step "done. The same by hand:"
cat <<TEXT
  export PATH="build/release/bin:\$PATH"
  nibble serve ${awq#"$PWD/"} --tp 2
  nibble chat "Why is the sky blue?"
TEXT
