"""Two groups of one model, each on a machine of its own, behind one gateway: one is lost, cut off
or replaced under load, and the other's streams never notice. Runs inside namespaces.py.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).parent))
import harness  # pylint: disable=wrong-import-position
import namespaces  # pylint: disable=wrong-import-position
import streams as st  # pylint: disable=wrong-import-position
from streams import FINISH_SECONDS, LOADED, STREAMS  # pylint: disable=wrong-import-position

TOKENS = 250
KILLED_SECONDS = 2 * LOADED
DETECTED_SECONDS = 5 * LOADED
# Of the gateway's keepalive towards groups, 10 + 5 s, after which a silent peer's streams end.
SILENT_SECONDS = 15 * LOADED
BACK_SECONDS = 5 * LOADED
CLIENT_LOST_SECONDS = 30 * LOADED
READY_SECONDS = 120
STALL_SECONDS = 5
# A client's window, so small that little is under way that nobody reads.
SMALL_WINDOW = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
LOST_CLIENTS = 200  # more than the groups have places for: they cannot finish soon
PORT = 50052
GATEWAY_PORT = 50051
GROUPS = ("w0", "w1")


class Program:
    """A program on one of the machines, its log and its end."""

    def __init__(self, folder, machine, label, words):
        self.announce = folder / f"{label}.json"
        self.log_path = folder / f"{label}.log"
        self.announce.unlink(missing_ok=True)
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [*namespaces.inside(machine), *words, "--announce", str(self.announce)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)

    def await_ready(self):
        harness.wait_until(lambda: self.announce.exists() or self.process.poll() is not None,
                           READY_SECONDS, "the program gets ready")
        if self.process.poll() is not None:
            raise AssertionError(self.log_path.read_text(errors="replace")[-2000:])
        return json.loads(self.announce.read_text(encoding="utf-8"))

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class GroupsTest(st.StreamChecks, harness.ModelTestCase):
    """A gateway and two groups of two ranks, for the whole class; each test leaves all ready."""

    programs = None
    folder = None

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        if cls.model is None:
            return
        harness.make_stubs()
        cls.folder = pathlib.Path(tempfile.mkdtemp(prefix="nibble-groups-"))
        cls.programs = {}
        try:
            for machine in GROUPS:
                cls.start_group(machine)
            cls.programs["g"] = Program(cls.folder, "g", "gateway", [
                str(harness.BUILD / "bin" / "nibble-gateway"),
                "--listen", f"0.0.0.0:{GATEWAY_PORT}", "--metrics-listen", "127.0.0.1:9100",
                "--stall-timeout", f"{STALL_SECONDS}s", "--groups",
                ",".join(f"{namespaces.address(machine)}:{PORT}" for machine in GROUPS)])
            for program in cls.programs.values():
                program.await_ready()
        except BaseException:
            cls.tearDownClass()
            raise

    @classmethod
    def start_group(cls, machine):
        own = namespaces.address(machine)
        cls.programs[machine] = Program(cls.folder, machine, machine, [
            str(harness.BUILD / "bin" / "nibble-worker"), "--model", str(cls.model), "--tp", "2",
            "--threads", "1", "--context", "1024", "--max-sequences", "32", "--step-deadline",
            "5s", "--listen", f"{own}:{PORT}", "--metrics-listen", f"{own}:9100"])

    @classmethod
    def tearDownClass(cls):
        for program in (cls.programs or {}).values():
            program.end()
        if cls.folder is not None:
            shutil.rmtree(cls.folder, ignore_errors=True)

    def setUp(self):
        self.addCleanup(self.heal_all)
        self.await_groups(GROUPS, READY_SECONDS)
        harness.wait_until(self.both_trusted, READY_SECONDS, "both groups are trusted again")

    def both_trusted(self):
        """Few requests go to a group that failed a moment ago; some have to end well."""
        if self.metric("nibble_gateway_worker_breaker_state") == 0:
            return True
        self.join(self.open(6, 2), FINISH_SECONDS)
        return False

    def tearDown(self):
        outcome = self._outcome.result
        if outcome is not None and (outcome.failures or outcome.errors):
            for label in ("gateway", *GROUPS):
                text = (self.folder / f"{label}.log").read_text(errors="replace")
                bad = [line for line in text.splitlines()
                       if re.search(r" (warn|error) |UNAVAILABLE|INTERNAL", line)]
                print("\n".join([f"--- {label}", *bad[-30:], "…", text[-1500:]]), file=sys.stderr)

    @staticmethod
    def heal_all():
        for machine in GROUPS:
            namespaces.heal("g", machine)
            namespaces.heal(machine, "g")

    @staticmethod
    def metric(metric, machine="g", **labels):
        where = "127.0.0.1" if machine == "g" else namespaces.address(machine)
        page = subprocess.run(
            [*namespaces.inside(machine), sys.executable, __file__, "get",
             f"http://{where}:9100/metrics"], capture_output=True, text=True, check=True).stdout
        return sum(value for found, value in harness.parse_metrics(page).get(metric, [])
                   if all(found.get(key) == wanted for key, wanted in labels.items()))

    def up(self, machine):
        return self.metric("nibble_gateway_worker_up", worker=f"g{GROUPS.index(machine)}") == 1

    def await_groups(self, machines, seconds):
        for machine in machines:
            harness.wait_until(lambda m=machine: self.up(m), seconds, f"{machine} is ready")

    def open(self, count, tokens=TOKENS, **how):
        channel, streams = st.open_streams(f"127.0.0.1:{GATEWAY_PORT}",
                                           [FINISH_SECONDS] * count, tokens, **how)
        self.addCleanup(channel.close)
        return streams

    def start_streams(self):
        """(streams of group 0, of group 1), all but a few of them in the middle of their answer,
        told apart by their leaders."""
        streams = self.open(2 * STREAMS)
        harness.wait_until(
            lambda: sum(stream.streaming for stream in streams) >= 2 * STREAMS - 4, 90,
            "the streams are in the middle of their answer")
        counts = [self.metric("nibble_requests_running", machine) for machine in GROUPS]
        for count in counts:
            self.assertGreaterEqual(count, st.COUNTED - 4, counts)
        return streams

    def split(self, streams):
        """(ended well, ended UNAVAILABLE); nothing else may have happened."""
        import grpc  # pylint: disable=import-outside-toplevel
        well = [s for s in streams if s.code == grpc.StatusCode.OK]
        lost = [s for s in streams if s.code == grpc.StatusCode.UNAVAILABLE]
        self.assertEqual(len(well) + len(lost), len(streams), {s.code for s in streams})
        return well, lost

    def check_one_group_lost(self, streams, fault_at, seconds, held):
        """At most what the lost group held ended, in time; all else is whole."""
        self.join(streams, FINISH_SECONDS)
        self.check(streams)
        well, lost = self.split(streams)
        self.assertEqual({stream.tokens for stream in well}, {TOKENS})
        self.assertGreaterEqual(len(lost), st.COUNTED - 4)
        self.assertLessEqual(len(lost), held)
        last = max(stream.ended_at for stream in lost)
        print(f"{self.id()}: {len(lost)} of {len(streams)} streams lost, after "
              f"{last - fault_at:.2f} s; {len(well)} whole")
        self.assertLess(last - fault_at, seconds)

    def check_idle(self, machines=GROUPS):
        for name in ("nibble_gateway_requests_inflight", "nibble_gateway_upstream_streams",
                     "nibble_gateway_stream_buffered_bytes"):
            harness.wait_until(lambda n=name: self.metric(n) == 0, 10, f"{name} is zero")
        for machine in machines:
            self.await_nothing_held(machine, 10)

    def await_nothing_held(self, machine, seconds):
        for name, labels in (("nibble_requests_running", {}), ("nibble_requests_waiting", {}),
                             ("nibble_slots_used", {}),
                             ("nibble_kv_cache_blocks", {"state": "used"}),
                             ("nibble_kv_cache_blocks", {"state": "quarantined"})):
            harness.wait_until(lambda n=name, l=labels: self.metric(n, machine, **l) == 0, seconds,
                               f"{machine}: {name} {labels} is zero")

    # ---- one of two is lost ----

    def test_a_killed_rank_is_its_groups_loss_alone(self):
        streams = self.start_streams()
        held = int(self.metric("nibble_requests_running", "w1"))
        group = self.programs["w1"].process.pid
        ranks = pathlib.Path(f"/proc/{group}/task/{group}/children").read_text().split()
        fault_at = time.monotonic()
        os.kill(int(ranks[1]), signal.SIGKILL)
        self.check_one_group_lost(streams, fault_at, KILLED_SECONDS, held)
        self.assertEqual(self.programs["w1"].process.wait(timeout=5 * LOADED), 5)
        self.check_all_ok(self.open(4, 10), 10)  # the other one serves
        self.start_group("w1")
        self.programs["w1"].await_ready()
        self.await_groups(GROUPS, BACK_SECONDS)
        self.check_idle()

    # ---- the network between the gateway and one group ----

    def partition(self, *directions):
        streams = self.start_streams()
        held = int(self.metric("nibble_requests_running", "w0"))
        fault_at = time.monotonic()
        for sender, receiver in directions:
            namespaces.cut(sender, receiver)
        harness.wait_until(lambda: not self.up("w0"), DETECTED_SECONDS, "the gateway has noticed")
        noticed = time.monotonic() - fault_at
        self.check_all_ok(self.open(4, 10), 10)  # new requests go to the other one
        self.check_one_group_lost(streams, fault_at, SILENT_SECONDS, held)
        self.await_nothing_held("w0", SILENT_SECONDS)  # the group's side has noticed, too
        healed_at = time.monotonic()
        self.heal_all()
        self.await_groups(GROUPS, BACK_SECONDS)
        print(f"{self.id()}: noticed after {noticed:.2f} s, back {time.monotonic() - healed_at:.2f}"
              " s after it healed")
        self.assertLess(noticed, DETECTED_SECONDS)
        self.check_idle()

    def test_partition_both_ways(self):
        self.partition(("g", "w0"), ("w0", "g"))

    def test_partition_towards_the_gateway(self):
        self.partition(("w0", "g"))

    def test_partition_towards_the_group(self):
        self.partition(("g", "w0"))

    # ---- clients ----

    def test_slow_and_dead_readers_hold_up_nobody(self):
        import grpc  # pylint: disable=import-outside-toplevel
        others = self.start_streams()
        slow = self.open(2, options=SMALL_WINDOW, pause=0.1, alternatives=5)
        dead = self.open(4, 800, options=SMALL_WINDOW, pause=3 * STALL_SECONDS, alternatives=20)
        self.check_all_ok(others, TOKENS)
        self.check_all_ok(slow, TOKENS)  # late, but every token
        self.join(dead, FINISH_SECONDS)
        for stream in dead:
            self.assertEqual(stream.code, grpc.StatusCode.RESOURCE_EXHAUSTED)
            self.assertEqual(stream.faults, [])
        self.check_idle()

    def cancelled(self):
        return sum(self.metric("nibble_requests_total", m, code="CANCELLED") for m in GROUPS)

    def test_clients_that_vanish_give_back_what_they_hold(self):
        others = self.open(4, 60)
        before = self.cancelled()
        with subprocess.Popen(
                [*namespaces.inside("c"), sys.executable, __file__, "client",
                 f"{namespaces.address('c', of_gateway=True)}:{GATEWAY_PORT}"],
                stdout=subprocess.PIPE, text=True) as client:
            self.assertEqual(client.stdout.readline().strip(), "streaming")
            fault_at = time.monotonic()
            namespaces.cut("g", "c")
            namespaces.cut("c", "g")
            try:
                for machine in GROUPS:
                    self.await_nothing_held(machine, CLIENT_LOST_SECONDS + 30)
                took = time.monotonic() - fault_at
                print(f"{self.id()}: nothing is held {took:.2f} s after the clients vanished")
                self.assertLess(took, CLIENT_LOST_SECONDS)
                # What ran was cancelled, and did not just come to its end.
                self.assertGreater(self.cancelled() - before, 2 * st.COUNTED)
            finally:
                client.kill()
                namespaces.heal("g", "c")
                namespaces.heal("c", "g")
        self.check_all_ok(others, 60)
        self.check_idle()

    # ---- names ----

    def test_a_group_that_comes_back_elsewhere_is_found(self):
        """As a pod that was replaced: the same name, another address."""
        port, places = PORT + 10, ("10.232.2.2", "10.232.2.3")
        namespaces.add_address("w1", places[1])

        def start(place):
            namespaces.name_address("the-group", place)
            group = Program(self.folder, "w1", "moving", [
                str(harness.BUILD / "bin" / "nibble-worker"), "--model", str(self.model),
                "--context", "256", "--listen", f"{place}:{port}", "--metrics-listen", ""])
            self.addCleanup(group.end)
            group.await_ready()
            return group
        group = start(places[0])
        gateway = Program(self.folder, "g", "moving-gateway", [
            str(harness.BUILD / "bin" / "nibble-gateway"), "--listen", harness.LOCAL,
            "--metrics-listen", harness.LOCAL, "--groups", f"the-group:{port}"])
        self.addCleanup(gateway.end)
        where = gateway.await_ready()["metrics"]

        def ready():
            return harness.http_get(where, "/readyz")[0] == 200
        harness.wait_until(ready, READY_SECONDS, "the gateway has found the group")
        group.end()
        harness.wait_until(lambda: not ready(), DETECTED_SECONDS, "it has noticed the loss")
        start(places[1])
        there_at = time.monotonic()
        harness.wait_until(ready, READY_SECONDS, "it has found the group again")
        took = time.monotonic() - there_at
        print(f"{self.id()}: found {took:.2f} s after it was there")
        self.assertLess(took, BACK_SECONDS)

    # ---- rollout ----

    def test_rolling_update_under_load(self):
        """Each group drains, leaves with 0 and is replaced, while streams come without a pause."""
        import grpc  # pylint: disable=import-outside-toplevel
        ended = []
        running = self.start_streams()
        for machine in GROUPS:
            self.programs[machine].process.send_signal(signal.SIGTERM)

            def left(m=machine):
                nonlocal running
                over = [s for s in running if s.code is not None]
                ended.extend(over)
                running = [s for s in running if s.code is None] + self.open(len(over), 40)
                return self.programs[m].process.poll() is not None
            harness.wait_until(left, FINISH_SECONDS, f"{machine} has drained")
            self.assertEqual(self.programs[machine].process.returncode, 0)
            self.start_group(machine)
            self.programs[machine].await_ready()
            self.await_groups([machine], BACK_SECONDS)
        self.join(running, FINISH_SECONDS)
        ended.extend(running)
        self.check(ended)
        print(f"{self.id()}: {len(ended)} streams, none failed")
        self.assertEqual({s.code for s in ended}, {grpc.StatusCode.OK})
        self.check_idle()


def client(address):
    """Streams that run until the process is killed; says when they are in the middle."""
    harness.make_stubs()
    _, streams = st.open_streams(address, [600] * LOST_CLIENTS, 900)
    harness.wait_until(lambda: sum(stream.streaming for stream in streams) >= 2 * st.COUNTED, 90,
                       "the streams are in the middle of their answer")
    print("streaming", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    if sys.argv[1:2] == ["client"]:
        client(sys.argv[2])
    elif sys.argv[1:2] == ["get"]:
        with urllib.request.urlopen(sys.argv[2], timeout=10) as answer:
            print(answer.read().decode())
    else:
        unittest.main()
