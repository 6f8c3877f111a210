#!/usr/bin/env python3
"""Time to the first token of a prompt that is computed, and of the same prompt once it is cached.

usage: tools/bench/prefix_ttft.py MODEL [--rounds 15] [--tokens 1000] [--json FILE]

Starts `nibble serve MODEL` of build/release (or NIBBLE_BINARY_DIR). Each round has a prompt of its
own and asks three times: computed, cached, and computed again because the cache is bypassed. Prints
medians with their quartiles, and the load of the machine.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "tests" / "e2e"))
import harness  # pylint: disable=wrong-import-position

KINDS = ("computed", "cached", "bypassed")


def ask(stub, ids, bypass):
    """(seconds to the first token, cached tokens)."""
    from nibble.inference.v1 import inference_pb2 as pb  # pylint: disable=import-outside-toplevel
    request = pb.GenerateStreamRequest(request=pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids), sampling=pb.SamplingParams(temperature=0),
        stopping=pb.StoppingCriteria(max_tokens=2, ignore_eos=True),
        output=pb.OutputOptions(token_ids=True), bypass_prefix_cache=bypass))
    began, first, cached = time.monotonic(), None, None
    for event in stub.GenerateStream(request, timeout=harness.CALL_SECONDS):
        if first is None and event.delta.token_ids:
            first = time.monotonic() - began
        if event.HasField("finished"):
            cached = event.finished.usage.cached_prompt_tokens
    return first, cached


def measure(stub, rounds, tokens):
    """{kind: [(seconds, cached tokens)]}."""
    found = {kind: [] for kind in KINDS}
    for number in rounds:
        ids = [100 + number] + [200 + at * 37 % 20000 for at in range(tokens - 1)]
        for kind in KINDS:
            found[kind].append(ask(stub, ids, kind == "bypassed"))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--json")
    options = parser.parse_args()

    import grpc  # pylint: disable=import-outside-toplevel
    harness.make_stubs()
    from nibble.inference.v1 import inference_pb2_grpc as rpc  # pylint: disable=C0415
    server = harness.Server(options.model, "--tp", "1", "--context", "2048")
    try:
        with grpc.insecure_channel(server.address) as channel:
            stub = rpc.InferenceServiceStub(channel)
            measure(stub, (999,), options.tokens)  # a warm-up, with a prompt that is not used again
            found = measure(stub, range(options.rounds), options.tokens)
    finally:
        server.close()
    records = []
    for kind in KINDS:
        times = [1000 * seconds for seconds, _ in found[kind]]
        low, middle, high = statistics.quantiles(times, n=4)
        records.append({"metric": "ttft_ms", "prompt": options.tokens, "prefix": kind,
                        "cached_tokens": found[kind][0][1], "value": round(middle, 1),
                        "quartiles": [round(low, 1), round(high, 1)], "runs": options.rounds})
        print(f"{kind:9} {middle:8.1f} ms ({low:.1f} to {high:.1f}), "
              f"{found[kind][0][1]} of {options.tokens} tokens cached")
    ratio = statistics.median(a / b for (a, _), (b, _) in zip(found["computed"], found["cached"]))
    print(f"computed over cached, median of the rounds: {ratio:.1f}; load {os.getloadavg()[0]:.1f}")
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(records, indent=1) + "\n",
                                              encoding="utf-8")


if __name__ == "__main__":
    main()
