#!/usr/bin/env python3
"""A gateway and two groups over the fake executor under steady load, with a random fault now and
then: what is held must not grow.

usage: soak.py SECONDS [SEED]   (make test-soak: an hour)

Streams ask the same seeded question, so every text is the beginning of the same one; each ends
exactly once. Group a is killed, drained and started again; the gateway and group b live through the
whole run, and their memory, descriptors and threads are what is looked at.
"""

import collections
import contextlib
import functools
import json
import math
import operator
import os
import pathlib
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).parent))
import harness  # pylint: disable=wrong-import-position
import streams as st  # pylint: disable=wrong-import-position

CLIENTS = 20  # of 32 places: about 60 % load
TOKENS = 100
SAMPLE_SECONDS = 2
WARM_UP_SHARE = 0.1
FAULT_SECONDS_MEAN = 120
SLOPE_MAX = 1.0  # MiB an hour
SHORT_SLOPE_MAX = 500.0  # of a run whose slope is mostly its beginning's
# gRPC's own pools, by the names that the kernel cuts, and how many threads of each are no more:
# the executor starts up to two a core and keeps them; the timers one more whenever all are busy as
# the next falls due, for good (timer_manager.cc), which has no bound, so a few are allowed.
POOLS = {"default-executo": 2 * os.cpu_count(), "grpc_global_tim": 4}
SHORT_SECONDS = 1800
GROUP_FLAGS = ("--max-sequences", "16", "--step-base", "20ms", "--vocab-size", "376")


class Program:
    """One program of the build, on free ports or on those that it had before."""

    def __init__(self, folder, label, binary, *flags):
        self.folder, self.label, self.binary, self.flags = folder, label, binary, flags
        self.start()

    def start(self):
        announce = self.folder / f"{self.label}.json"
        announce.unlink(missing_ok=True)
        with open(self.folder / f"{self.label}.log", "ab") as log:
            self.process = subprocess.Popen(
                [str(harness.BUILD / "bin" / self.binary), *self.flags, "--announce",
                 str(announce)], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        harness.wait_until(announce.exists, 60, f"{self.label} is ready")
        self.addresses = json.loads(announce.read_text(encoding="utf-8"))

    def metric(self, name, **labels):
        page = harness.parse_metrics(harness.http_get(self.addresses["metrics"], "/metrics")[1])
        return sum(value for found, value in page.get(name, [])
                   if all(found.get(key) == wanted for key, wanted in labels.items()))

    def usage(self):
        """(resident bytes, descriptors, threads with pools counted at their bounds, how many of
        each name)"""
        process = pathlib.Path(f"/proc/{self.process.pid}")
        pages = int((process / "statm").read_text().split()[1])
        names = collections.Counter()
        for thread in (process / "task").iterdir():
            with contextlib.suppress(OSError):  # it has ended
                names[(thread / "comm").read_text().strip()] += 1
        counted = (names | collections.Counter(POOLS)).total()  # the larger of both, by name
        return (pages * os.sysconf("SC_PAGESIZE"), len(os.listdir(process / "fd")), counted, names)

    def signal(self, number):
        self.process.send_signal(number)

    def end(self):
        self.process.kill()
        self.process.wait()


class Clients:
    """Threads that each run one stream after another and check it."""

    def __init__(self, address):
        self.address = address
        self.codes = collections.Counter()
        self.faults = []
        self.text = ""
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.running = set()
        self.threads = [threading.Thread(target=self.run, daemon=True) for _ in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def run(self):
        while not self.stopping.is_set():
            channel, (stream,) = st.open_streams(self.address, [30], TOKENS, seed=7)
            with self.lock:
                self.running.add(stream)
            stream.thread.join()
            channel.close()
            with self.lock:
                self.running.discard(stream)
                self.codes[stream.code.name] += 1
                self.faults += stream.faults
                if len(stream.text) > len(self.text):
                    self.text, stream.text = stream.text, self.text
                if not self.text.startswith(stream.text):
                    self.faults.append("a text is not the beginning of the others'")
            if stream.code.name != "OK":
                time.sleep(0.2)

    def cancel_all(self):
        with self.lock:
            for stream in self.running:
                stream.call.cancel()

    def stop(self):
        self.stopping.set()
        for thread in self.threads:
            thread.join(60)


class Faults:
    """Each leaves the server as it was, or ends a part that is started again."""

    def __init__(self, seed, gateway, groups, clients):
        self.random = random.Random(seed)
        self.gateway, self.groups, self.clients = gateway, groups, clients
        self.done = collections.Counter()

    def next(self):
        fault = self.random.choice([self.kill, self.drain, self.pause, self.pause_gateway,
                                    self.cancel, self.junk, self.leave])
        self.done[fault.__name__] += 1
        fault()

    def kill(self):
        self.groups["a"].end()
        self.groups["a"].start()

    def drain(self):
        self.groups["a"].signal(signal.SIGTERM)
        self.groups["a"].process.wait(90)
        self.groups["a"].start()

    def pause(self):
        self._pause(self.groups[self.random.choice("ab")])

    def pause_gateway(self):
        self._pause(self.gateway)

    def _pause(self, program):
        program.signal(signal.SIGSTOP)
        time.sleep(self.random.uniform(0.2, 3))
        program.signal(signal.SIGCONT)

    def cancel(self):
        self.clients.cancel_all()

    def junk(self):
        """Bytes that are no HTTP/2, on every port."""
        for program in (self.gateway, *self.groups.values()):
            for address in program.addresses.values():
                host, port = address.rsplit(":", 1)
                with socket.create_connection((host, int(port)), timeout=10) as connection:
                    connection.sendall(self.random.randbytes(4096))

    def leave(self):
        """Connections that are reset in the middle of what they read."""
        channel, streams = st.open_streams(self.gateway.addresses["grpc"], [30] * 5, TOKENS)
        time.sleep(0.5)
        channel.close()
        for stream in streams:
            stream.thread.join(60)


def slope(points):
    """Theil and Sen's slope of (seconds, bytes) in MiB an hour, and its upper 95 % bound."""
    step = max(1, len(points) // 400)
    points = points[::step]
    slopes = sorted((b[1] - a[1]) / (b[0] - a[0])
                    for i, a in enumerate(points) for b in points[i + 1:])
    count, pairs = len(points), len(slopes)
    margin = 1.645 * math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    upper = slopes[min(pairs - 1, int((pairs + margin) / 2))]
    return statistics.median(slopes) * 3600 / 2**20, upper * 3600 / 2**20


class Soak:
    def __init__(self, seconds, seed):
        self.seconds, self.failures = seconds, []
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="nibble-soak-"))
        text = self.folder / "text"
        text.mkdir()
        shutil.copyfile(harness.SOURCE / "tests/data/text/byte-level-tokenizer.json",
                        text / "tokenizer.json")
        self.groups = {}
        for label in "ab":
            ports = [self.free_port() for _ in range(2)]
            self.groups[label] = Program(
                self.folder, label, "fake_worker", *GROUP_FLAGS, "--tokenizer", str(text),
                "--listen", f"127.0.0.1:{ports[0]}", "--metrics-listen", f"127.0.0.1:{ports[1]}")
        self.gateway = Program(
            self.folder, "gateway", "nibble-gateway", "--listen", harness.LOCAL,
            "--metrics-listen", harness.LOCAL, "--log-level", "error", "--groups",
            ",".join(group.addresses["grpc"] for group in self.groups.values()))
        self.clients = Clients(self.gateway.addresses["grpc"])
        self.faults = Faults(seed, self.gateway, self.groups, self.clients)
        self.samples = {"gateway": [], "group b": []}

    @staticmethod
    def free_port():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    def sample(self, at):
        for label, program in (("gateway", self.gateway), ("group b", self.groups["b"])):
            self.samples[label].append((at, *program.usage()))

    def run(self):
        begin = time.monotonic()
        mean = min(FAULT_SECONDS_MEAN, self.seconds / 20)
        next_fault = self.seconds * WARM_UP_SHARE
        while (at := time.monotonic() - begin) < self.seconds:
            if at >= self.seconds * WARM_UP_SHARE:
                self.sample(at)
            if at >= next_fault:
                self.faults.next()
                next_fault = at + self.faults.random.expovariate(1 / mean)
            time.sleep(SAMPLE_SECONDS)
        self.clients.stop()
        self.judge()

    def expect(self, held, what):
        print(f"{'held    ' if held else 'NOT HELD'} {what}")
        if not held:
            self.failures.append(what)

    def judge(self):
        print(f"{sum(self.clients.codes.values())} streams: {dict(self.clients.codes)}; faults: "
              f"{dict(self.faults.done)}")
        allowed = {"OK", "UNAVAILABLE", "CANCELLED"}
        self.expect(set(self.clients.codes) <= allowed, f"streams end {sorted(allowed)} alone")
        self.expect(not self.clients.faults, f"every stream is whole {self.clients.faults[:3]}")
        for label, samples in self.samples.items():
            points = [(at, rss) for at, rss, *_ in samples]
            middle, upper = slope(points)
            bound = SLOPE_MAX if self.seconds >= SHORT_SECONDS else SHORT_SLOPE_MAX
            self.expect(upper < bound, f"{label}: {middle:+.2f} MiB/h, at most {upper:+.2f} with "
                                       f"95 % (bound {bound:.0f})")
            half = len(samples) // 2
            for name, column in (("descriptors", 2), ("threads", 3)):
                before = max(sample[column] for sample in samples[:half])
                after = max(sample[column] for sample in samples[half:])
                self.expect(after <= before, f"{label}: {name} at most {before}, then {after}")
            before, after = (functools.reduce(operator.or_, (sample[4] for sample in part))
                             for part in (samples[:half], samples[half:]))
            if after - before:
                print(f"         {label}: more threads than before: {dict(after - before)}")
        self.judge_idle()

    def judge_idle(self):
        for program, name, labels in (
                (self.gateway, "nibble_gateway_requests_inflight", {}),
                (self.gateway, "nibble_gateway_upstream_streams", {}),
                (self.gateway, "nibble_gateway_stream_buffered_bytes", {}),
                *((group, name, labels) for group in self.groups.values() for name, labels in (
                    ("nibble_requests_running", {}), ("nibble_slots_used", {}),
                    ("nibble_kv_cache_blocks", {"state": "used"}),
                    ("nibble_kv_cache_blocks", {"state": "quarantined"})))):
            try:
                harness.wait_until(lambda p=program, n=name, l=labels: p.metric(n, **l) == 0, 15,
                                   "zero")
            except AssertionError:
                self.expect(False, f"{program.label}: {name} {labels} is zero when idle")

    def close(self):
        for program in (self.gateway, *self.groups.values()):
            program.end()
        shutil.rmtree(self.folder, ignore_errors=True)


def main():
    seconds = int(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(2**31)
    harness.make_stubs()
    cores, load = os.cpu_count(), os.getloadavg()[0]
    print(f"soak of {seconds} s, seed {seed}, load average {load:.1f} on {cores} cores", flush=True)
    soak = Soak(seconds, seed)
    try:
        soak.run()
    finally:
        soak.close()
    print("HELD" if not soak.failures else "NOT HELD")
    return 0 if not soak.failures else 1


if __name__ == "__main__":
    sys.exit(main())
