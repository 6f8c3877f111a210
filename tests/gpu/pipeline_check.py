#!/usr/bin/env python3
"""The whole pipeline on a machine with GPUs: gateway, leader and followers as processes.

  pipeline_check.py --bundle FOLDER --model FOLDER [--tp 1 2] [--serve] [--machines] [--faults]
                    [--record FOLDER]

For every degree a worker group and a gateway are started from the bundle, each golden prompt is
streamed through `nibble generate`, greedy, and its text compared with the goldens and with the
first degree's; metrics are scraped: memory of every rank by owner, actual and planned, and
throughput. --serve does the same through `nibble serve`, --machines with a group of two machines,
as which two worker processes with a GPU each pass, or with the same one: NCCL is told that they are
two hosts, and meets over the loopback. --faults kills a rank and starts groups
that must be refused. --record keeps what the first degree's worker and gateway export after the
prompts and a refused request, for the boards' test (tests/deploy/data). Prints a table; exits 0
when all of it holds. Needs Python alone.
"""

import argparse
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

OWNERS = ("weights", "kv_cache", "activations", "workspace", "graphs")
FAILURES = []


def check(holds, what):
    print(f"  {'ok  ' if holds else 'FAIL'} {what}", flush=True)
    if not holds:
        FAILURES.append(what)


class Process:
    """A program with its output in a file; killed with the block."""

    def __init__(self, command, log, environment=None):
        self.log = pathlib.Path(log)
        self.popen = subprocess.Popen([str(word) for word in command], stderr=self.log.open("w"),
                                      stdout=subprocess.DEVNULL, start_new_session=True,
                                      env={**os.environ, **(environment or {})})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
            try:
                self.popen.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.popen.pid, signal.SIGKILL)
                self.popen.wait()

    def announced(self, path, seconds=180):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if path.exists():
                return json.loads(path.read_text())
            if self.popen.poll() is not None:
                break
            time.sleep(0.02)
        raise SystemExit(f"no announcement at {path}:\n{self.log.read_text()[-3000:]}")


def await_ready(address, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"http://{address}/readyz", timeout=5) as reply:
                if reply.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.02)
    raise SystemExit(f"{address} is not ready")


def scrape(address):
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as reply:
        return reply.read().decode()


def value(metrics, name, *labels):
    """The sum over the samples of a metric that carry all of the labels."""
    total = 0.0
    for line in metrics.splitlines():
        match = re.match(r"(\w+)(\{.*\})? (\S+)$", line)
        if match and match[1] == name and all(label in (match[2] or "") for label in labels):
            total += float(match[3])
    return total


def gpu_memory_used():
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    text = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    return [int(line) for line in text.split()]


def stream(bundle, server, prompt, tokens=64):
    run = subprocess.run([bundle / "nibble", "generate", "--server", server, "--temperature", "0",
                          "--max-tokens", str(tokens), "--timeout", "60s", prompt],
                         capture_output=True, text=True, timeout=90)
    if run.returncode != 0:
        return f"exit {run.returncode}: {run.stderr}"
    return run.stdout


def ask_all(arguments, server, goldens):
    return [stream(arguments.bundle, server, golden["prompt"]) for golden in goldens]


def keep(folder, exporters, bundle, server):
    """With a refused request behind it, what is counted by its kind is there, too."""
    words = ["generate", "--server", server, "--model", "unknown", "Once"]
    subprocess.run([bundle / "nibble", *words], capture_output=True, timeout=60, check=False)
    folder.mkdir(parents=True, exist_ok=True)
    for name, address in exporters.items():
        (folder / f"gpu_metrics_{name}.txt").write_text(scrape(address))


def report_memory(metrics, ranks, shared_gpu=False):
    """On a GPU that others fill at the same time, what the driver took cannot be told apart."""
    for rank in ranks:
        label = f'rank="{rank}"'
        actual = {o: value(metrics, "nibble_memory_bytes", label, f'kind="{o}"') for o in OWNERS}
        planned = {o: value(metrics, "nibble_memory_planned_bytes", label, f'kind="{o}"')
                   for o in OWNERS}
        print(f"  rank {rank}: " + ", ".join(
            f"{o} {actual[o] / 1e6:.1f} of {planned[o] / 1e6:.1f} MB" for o in OWNERS))
        check(all(actual[o] > 0 for o in OWNERS), f"rank {rank} exports memory by owner")
        if shared_gpu:
            continue
        total, plan = sum(actual.values()), sum(planned.values())
        check(abs(total - plan) <= 0.01 * plan, f"rank {rank} holds what was planned "
              f"({100 * (total - plan) / plan:+.2f} %)")


def compare(texts, goldens, reference, degree):
    for golden, text in zip(goldens, texts):
        expected = golden["generated_text_until_eos"]
        same = text.strip() == expected.strip()
        print(f"  {golden['name']}: {'as the golden' if same else repr(text)}")
    same = sum(t.strip() == g["generated_text_until_eos"].strip() for t, g in zip(texts, goldens))
    check(same >= len(goldens) - 1, f"tp {degree}: {same} of {len(goldens)} golden texts")
    if reference is not None:
        check(texts == reference, f"tp {degree}: the same texts as the first degree")


def run_degree(arguments, degree, goldens, reference, folder):
    scratch = pathlib.Path(tempfile.mkdtemp(dir=folder))
    print(f"tp {degree}", flush=True)
    begin = time.monotonic()
    worker_file, gateway_file = scratch / f"w{degree}.json", scratch / f"g{degree}.json"
    worker_command = [arguments.bundle / "nibble-worker", "--model", arguments.model, "--device",
                      "cuda", "--tp", degree, "--listen", "127.0.0.1:0", "--metrics-listen",
                      "127.0.0.1:0", "--announce", worker_file, "--context", "2048",
                      "--memory-fraction", "0.2"]
    with Process(worker_command, scratch / f"w{degree}.log") as worker:
        addresses = worker.announced(worker_file)
        print(f"  serves after {time.monotonic() - begin:.1f} s")
        gateway_command = [arguments.bundle / "nibble-gateway", "--groups", addresses["grpc"],
                           "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0",
                           "--announce", gateway_file]
        with Process(gateway_command, scratch / f"g{degree}.log") as gateway:
            announced = gateway.announced(gateway_file)
            await_ready(announced["metrics"])
            exporters = {"worker": addresses["metrics"], "gateway": announced["metrics"]}
            record = arguments.record if reference is None else None
            texts = ask_all(arguments, announced["grpc"], goldens)
            if record is not None:
                keep(record, exporters, arguments.bundle, announced["grpc"])
            compare(texts, goldens, reference, degree)
            metrics = scrape(addresses["metrics"])
            report_memory(metrics, range(degree))
            check(value(metrics, "nibble_generated_tokens_total") > 0, "tokens are counted")
            check(value(metrics, "nibble_rank_steps_total", f'rank="{degree - 1}"') > 0,
                  "the last rank counts its steps")
            check(degree == 1 or value(metrics, "nibble_collective_bytes_total") > 0,
                  "bytes given to collectives are counted")
            if arguments.faults and degree > 1:
                kill_a_rank(arguments, worker, announced["grpc"], degree)
    return texts


def children(pid):
    listed = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(word) for word in listed]


def kill_a_rank(arguments, worker, server, degree):
    ranks = children(worker.popen.pid)
    check(len(ranks) == degree, f"{degree} rank processes")
    before = gpu_memory_used()
    # While the others compute, so that kernels wait for the one that is gone.
    client = subprocess.Popen([arguments.bundle / "nibble", "generate", "--server", server,
                               "--temperature", "1", "--seed", "7", "--max-tokens", "1900", "Once"],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    client.stdout.read(40)
    begin = time.monotonic()
    os.kill(ranks[-1], signal.SIGKILL)
    code = worker.popen.wait(30)
    seconds = time.monotonic() - begin
    check(code == 5 and seconds < 10,
          f"a killed rank ends the group in {seconds:.1f} s, exit {code}")
    _, error = client.communicate(timeout=30)
    check("UNAVAILABLE" in error, "its stream ends UNAVAILABLE")
    time.sleep(1)
    after = gpu_memory_used()
    print(f"  GPU memory in use: {before} MB, then {after} MB")
    check(max(after) < 1000, "its GPU memory is released")


def run_serve(arguments, goldens, reference, scratch):
    print("nibble serve", flush=True)
    file = scratch / "serve.json"
    command = [arguments.bundle / "nibble", "serve", arguments.model, "--device", "cuda", "--port",
               "0", "--metrics-listen", "127.0.0.1:0", "--worker-metrics-listen", "127.0.0.1:0",
               "--announce", file, "--context", "2048", "--memory-fraction", "0.2"]
    with Process(command, scratch / "serve.log") as serve:
        addresses = serve.announced(file)
        await_ready(addresses["metrics"])
        texts = ask_all(arguments, addresses["grpc"], goldens)
        check(texts == reference, "serve: the same texts as the first degree")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_machine(arguments, index, leader, scratch):
    file = scratch / f"machine{index}.json"
    command = [arguments.bundle / "nibble-worker", "--model", arguments.model, "--device", "cuda",
               "--tp", "2", "--group-size", "2", "--group-index", index, "--group-leader", leader,
               "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--announce", file,
               "--context", "2048", "--memory-fraction", "0.2"]
    gpu = index if len(gpu_memory_used()) > 1 else 0
    environment = {"CUDA_VISIBLE_DEVICES": str(gpu), "NCCL_HOSTID": f"machine-{index}",
                   "NCCL_SOCKET_IFNAME": "lo"}
    return Process(command, scratch / f"machine{index}.log", environment), file


def run_machines(arguments, goldens, reference, scratch):
    print("two machines, a rank each", flush=True)
    begin = time.monotonic()
    leader = f"127.0.0.1:{free_port()}"
    first, first_file = start_machine(arguments, 0, leader, scratch)
    second, second_file = start_machine(arguments, 1, leader, scratch)
    with first, second:
        addresses, others = first.announced(first_file), second.announced(second_file)
        print(f"  serves after {time.monotonic() - begin:.1f} s")
        file = scratch / "machines.json"
        command = [arguments.bundle / "nibble-gateway", "--groups", addresses["grpc"], "--listen",
                   "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--announce", file]
        with Process(command, scratch / "machines.log") as gateway:
            announced = gateway.announced(file)
            await_ready(announced["metrics"])
            begin = time.monotonic()
            texts = ask_all(arguments, announced["grpc"], goldens)
            print(f"  {len(goldens)} texts in {time.monotonic() - begin:.1f} s")
            compare(texts, goldens, reference, 2)
        for rank, metrics in enumerate((addresses["metrics"], others["metrics"])):
            report_memory(scrape(metrics), [rank], shared_gpu=len(gpu_memory_used()) == 1)
        begin = time.monotonic()
        os.kill(children(second.popen.pid)[0], signal.SIGKILL)
        codes = [machine.popen.wait(30) for machine in (second, first)]
        seconds = time.monotonic() - begin
        check(codes == [5, 5] and seconds < 10,
              f"a killed rank ends both machines in {seconds:.1f} s, exits {codes}")


def refusal(arguments, name, words, code, pattern, environment=None):
    run = subprocess.run([arguments.bundle / "nibble-worker", "--model", arguments.model,
                          "--device", "cuda", "--listen", "127.0.0.1:0", "--metrics-listen", "",
                          *words], capture_output=True, text=True, timeout=60,
                         env={**os.environ, **(environment or {})})
    lines = [line for line in run.stderr.splitlines() if line.startswith("nibble-worker:")]
    print("    " + "\n    ".join(lines))
    check(run.returncode == code and len(lines) == 1 and re.search(pattern, lines[0]) is not None,
          f"{name}: one line, exit {run.returncode}")


def run_refusals(arguments):
    print("refused", flush=True)
    refusal(arguments, "no GPU visible", [], 4, "no GPU", {"CUDA_VISIBLE_DEVICES": ""})
    refusal(arguments, "a follower without a GPU", ["--tp", "2"], 4, "rank 1 .*GPU of its own",
            {"CUDA_VISIBLE_DEVICES": "0"})
    refusal(arguments, "too little memory", ["--memory", "64MiB"], 4, "the budget is")
    refusal(arguments, "too little free memory",
            ["--kv-blocks", "100000000", "--context", "2048"], 4, "% of what is free on GPU 0")


def run_full_gpu(arguments, scratch):
    """A second group on a GPU whose memory a first one has taken."""
    print("a GPU that another process holds", flush=True)
    file = scratch / "holder.json"
    command = [arguments.bundle / "nibble-worker", "--model", arguments.model, "--device", "cuda",
               "--listen", "127.0.0.1:0", "--metrics-listen", "", "--announce", file,
               "--kv-blocks", "380000", "--memory-fraction", "0.99"]
    with Process(command, scratch / "holder.log") as holder:
        holder.announced(file)
        print(f"  GPU memory in use: {gpu_memory_used()} MB")
        refusal(arguments, "a GPU used up", ["--kv-blocks", "40000"], 4, "free on GPU 0")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=pathlib.Path, required=True)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--tp", type=int, nargs="+", default=[1])
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--machines", action="store_true")
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--record", type=pathlib.Path)
    arguments = parser.parse_args()
    goldens = json.loads((arguments.model / "goldens.json").read_text())["prompts"]
    goldens = [golden for golden in goldens if golden["kind"] == "raw"]
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        reference = None
        for degree in arguments.tp:
            texts = run_degree(arguments, degree, goldens, reference, scratch)
            reference = reference or texts
        if arguments.serve:
            run_serve(arguments, goldens, reference, scratch)
        if arguments.machines:
            run_machines(arguments, goldens, reference, scratch)
        if arguments.faults:
            run_full_gpu(arguments, scratch)
    if arguments.faults:
        run_refusals(arguments)
    print(f"{len(FAILURES)} failed" if FAILURES else "all of it holds")
    return 1 if FAILURES else 0


if __name__ == "__main__":
    sys.exit(main())
