#!/usr/bin/env python3
"""Times nibble and llama.cpp side by side on one machine: decode at batch 1 and prefill.

The runs alternate: in each round every contender is timed once for each number of threads, so
that whatever else the machine does falls on all of them. A figure is the median over the rounds,
its spread the distance from the lowest to the highest.

llama.cpp is timed by its own llama-bench: no sampling, no language binding, a warm-up before
every test, flash attention off and on. node-llama-cpp (--node-package) is timed beside it if asked.

usage: tools/bench/compare_llama_cpp.py MODEL --gguf FILE --llama-bench PROGRAM [options]
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
COMMAND_SECONDS_MAX = 600

GGUF_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0",
              12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 30: "BF16"}
GGUF_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
GGUF_STRING, GGUF_ARRAY = 8, 9


class GgufHeader:
    """Types of the tensors of a GGUF file, by name."""

    def __init__(self, path):
        self._file = open(path, "rb")
        with self._file:
            magic, _, tensors, values = struct.unpack("<4sIQQ", self._file.read(24))
            if magic != b"GGUF":
                raise SystemExit(f"{path}: not a GGUF file")
            for _ in range(values):
                self._string()
                self._skip(self._number("<I"))
            self.types = dict(self._tensor() for _ in range(tensors))

    def _number(self, form):
        return struct.unpack(form, self._file.read(struct.calcsize(form)))[0]

    def _string(self):
        return self._file.read(self._number("<Q")).decode(errors="replace")

    def _skip(self, kind):
        if kind == GGUF_STRING:
            self._string()
        elif kind == GGUF_ARRAY:
            element, count = self._number("<I"), self._number("<Q")
            for _ in range(count):
                self._skip(element)
        else:
            self._file.read(GGUF_SCALARS[kind])

    def _tensor(self):
        name = self._string()
        self._file.read(8 * self._number("<I"))
        kind = self._number("<I")
        self._file.read(8)
        return name, GGUF_TYPES.get(kind, f"type {kind}")

    def head(self):
        return self.types.get("output.weight", self.types["token_embd.weight"])

    def layers(self):
        return self.types["blk.0.ffn_down.weight"]


def run(command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True,
                          timeout=COMMAND_SECONDS_MAX, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stderr}")
    return done.stdout


@dataclasses.dataclass
class Sample:
    """One contender, one number of threads, one round."""
    metric: str
    value: float
    prompt: int
    setting: str = ""


class Nibble:
    engine = "nibble"

    def __init__(self, options, head):
        self._options, self._head = options, head
        version = run([options.nibble, "--version"]).split("\n")[0]
        self.facts = {"engine": self.engine, "version": version.split()[1], "weights": "AWQ int4",
                      "head": "int8" if head == "int8" else "fp16",
                      "numerics": "fast, int8 activations" if head == "int8" else
                                  "fast, 16-bit activations"}

    def round(self, threads):
        options = self._options
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            run([options.nibble, "bench", options.model, "--threads", threads, "--head", self._head,
                 "--batches", 1, "--decode-context", 1, "--decode-tokens", options.generate,
                 "--prompts", options.prompt, "--runs", options.repeats, "--json", file.name])
            records = json.load(file)
        self.facts["isa"] = records[0]["isa"]
        return [Sample(record["metric"], record["value"], record["prompt"]) for record in records
                if record["metric"] in ("decode_tokens_per_second", "prefill_tokens_per_second")]


class LlamaBench:
    engine = "llama.cpp"

    def __init__(self, options, gguf):
        self._options, self._gguf = options, gguf
        header = GgufHeader(gguf)
        self.facts = {"engine": self.engine, "version": options.llama_version,
                      "weights": header.layers(), "head": header.head(),
                      "numerics": "int8 activations", "isa": options.llama_isa}

    def round(self, threads):
        options = self._options
        results = json.loads(run([
            options.llama_bench, "-m", self._gguf, "-t", threads, "-p", options.prompt,
            "-n", options.generate, "-fa", options.flash_attention, "-r", options.repeats,
            "-o", "json"]))
        samples = []
        for result in results:
            value = statistics.median(result["samples_ts"])
            attention = "flash attention" if result["flash_attn"] else "no flash attention"
            if result["n_gen"] == 0:
                prefill = "prefill_tokens_per_second"
                samples.append(Sample(prefill, value, options.prompt, attention))
            else:
                samples.append(Sample("decode_tokens_per_second", value, 0, attention))
        return samples


class NodeLlama:
    engine = "node-llama-cpp"

    def __init__(self, options):
        self._options = options
        package = pathlib.Path(options.node_package) / "node_modules/node-llama-cpp/package.json"
        header = GgufHeader(options.gguf)
        self.facts = {"engine": self.engine, "version": json.loads(package.read_text())["version"],
                      "weights": header.layers(), "head": header.head(),
                      "numerics": "int8 activations", "isa": "its prebuilt choice"}

    def round(self, threads):
        options = self._options
        result = json.loads(run([
            "node", ROOT / "tools/bench/llama_cpp_bench.mjs", options.gguf,
            "--package", options.node_package, "--threads", threads, "--prompt", options.prompt,
            "--generate", options.generate, "--runs", options.repeats]))
        def median(key):
            return statistics.median(one[key] for one in result["runs"])
        return [Sample("prefill_tokens_per_second", median("prefill_tokens_per_second"),
                       options.prompt, "flash attention"),
                Sample("decode_tokens_per_second", median("decode_tokens_per_second"), 0,
                       "flash attention")]


class EngineBench:
    """Steps of nibble's engine over the fake executor, 64 sequences: no model, one thread."""
    engine = "nibble"

    def __init__(self, options):
        self._program = options.engine_bench
        self.facts = {"engine": self.engine, "version": "", "weights": "none", "head": "none",
                      "numerics": "fake executor", "isa": "any"}

    def round(self, _):
        benchmarks = json.loads(run([self._program, "--benchmark_format=json",
                                     "--benchmark_filter=:64/prefix_cache:1/"]))["benchmarks"]
        return [Sample("engine_steps_per_second", one["steps"], 0,
                       "through the ring" if "Ring" in one["name"] else "in process")
                for one in benchmarks]


def measure(contenders, threads, rounds, pause):
    """{(contender, metric, prompt, setting, threads): [value of each round]}, and the load."""
    values, loads = {}, []
    for number in range(rounds):
        for count in threads:
            for index, contender in enumerate(contenders):
                print(f"round {number + 1} of {rounds}: {contender.engine} "
                      f"{contender.facts['weights']}, head {contender.facts['head']}, "
                      f"{count} threads", file=sys.stderr)
                loads.append(os.getloadavg()[0])
                time.sleep(pause)
                for sample in contender.round(count):
                    key = (index, sample.metric, sample.prompt, sample.setting, count)
                    values.setdefault(key, []).append(sample.value)
    return values, loads


def records_of(contenders, values):
    records = []
    for (index, metric, prompt, setting, threads), rounds in values.items():
        facts = contenders[index].facts
        records.append({
            "metric": metric, "value": round(statistics.median(rounds), 2), "threads": threads,
            "batch": 64 if metric == "engine_steps_per_second" else 1,
            "prompt": prompt, "isa": facts["isa"], "runs": len(rounds),
            "spread": round(max(rounds) - min(rounds), 2),
            "values": [round(value, 2) for value in rounds], "setting": setting,
            **{key: facts[key] for key in ("engine", "version", "weights", "head", "numerics")}})
    return records


def best(records, metric, **wanted):
    """The fastest record over numbers of threads and settings."""
    chosen = [record for record in records if record["metric"] == metric
              and all(record[key] == value for key, value in wanted.items())]
    return max(chosen, key=lambda record: record["value"]) if chosen else None


def paired_ratios(first, second):
    """Per round, as both were timed one after the other."""
    return [a / b for a, b in zip(first["values"], second["values"])]


def table(contenders, records):
    lines = ["| engine | weights, head | decode, batch 1: tokens/s | prefill: tokens/s |",
             "|---|---|---|---|"]
    for contender in contenders:
        facts = contender.facts
        wanted = {key: facts[key] for key in ("engine", "weights", "head")}
        cells = []
        for metric in ("decode_tokens_per_second", "prefill_tokens_per_second"):
            record = best(records, metric, **wanted)
            how = f"{record['threads']} threads" if record["threads"] > 1 else "1 thread"
            how += f", {record['setting']}" if record["setting"] else ""
            cells.append(f"{record['value']:.1f} ± {record['spread'] / 2:.1f} ({how})")
        lines.append(f"| {facts['engine']} {facts['version']} | {facts['weights']}, "
                     f"{facts['head']} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def ratios(contenders, records):
    lines = []
    for contender in contenders[1:]:
        facts = contender.facts
        parts = []
        for name, metric in (("decode", "decode_tokens_per_second"),
                             ("prefill", "prefill_tokens_per_second")):
            ours = best(records, metric, engine="nibble", head=contenders[0].facts["head"])
            theirs = best(records, metric, **{key: facts[key]
                                              for key in ("engine", "weights", "head")})
            each = sorted(paired_ratios(ours, theirs))
            parts.append(f"{name} {statistics.median(each):.2f} ({each[0]:.2f} … {each[-1]:.2f})")
        lines.append(f"{facts['engine']} {facts['weights']}, head {facts['head']}: "
                     + ", ".join(parts))
    return "\n".join(lines)


def cpu_model():
    text = pathlib.Path("/proc/cpuinfo").read_text()
    match = re.search(r"model name\s*: (.*)", text)
    return match[1] if match else "unknown"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="AWQ folder for nibble")
    parser.add_argument("--gguf", required=True, help="the same model for llama.cpp")
    parser.add_argument("--also-gguf", action="append", default=[], help="another width of it")
    parser.add_argument("--llama-bench", required=True, help="llama.cpp's benchmark program")
    parser.add_argument("--llama-version", default="unnamed")
    parser.add_argument("--llama-isa", default="-march=native")
    parser.add_argument("--flash-attention", default="0,1", help="llama.cpp's: off, on")
    parser.add_argument("--node-package", help="folder with node_modules/node-llama-cpp")
    parser.add_argument("--engine-bench", help="nibble's engine_bench, to be recorded too")
    parser.add_argument("--nibble", default=str(ROOT / "build/release/bin/nibble"))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3, help="of each test in a round")
    parser.add_argument("--pause", type=float, default=0,
                        help="seconds before each timing, for what else a shared machine does")
    parser.add_argument("--json", help="file that gets the records")
    return parser.parse_args()


def main():
    options = parse_arguments()
    contenders = [Nibble(options, "int8"), LlamaBench(options, options.gguf),
                  Nibble(options, "stored")]
    contenders += [LlamaBench(options, gguf) for gguf in options.also_gguf]
    if options.node_package:
        contenders.append(NodeLlama(options))
    threads = [int(count) for count in options.threads.split(",")]
    values, loads = measure(contenders, threads, options.rounds, options.pause)
    records = records_of(contenders, values)
    if options.engine_bench:
        bench = EngineBench(options)
        engine = records_of([bench], measure([bench], [1], options.rounds, 0)[0])
        records += engine
        for record in engine:
            print(f"engine steps/s, {record['setting']}: {record['value']:.0f} "
                  f"± {record['spread'] / 2:.0f}")
    print(f"{cpu_model()}, {os.cpu_count()} cores; load average {min(loads):.1f} … "
          f"{max(loads):.1f}; {options.rounds} rounds\n")
    print(table(contenders, records))
    print(f"\nnibble with the int8 head, times the other, round by round:\n"
          f"{ratios(contenders, records)}")
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
