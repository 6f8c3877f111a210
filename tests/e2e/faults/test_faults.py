"""Processes of a real server are killed or stopped under load.

What users are promised: every stream ends exactly once, with a status that says what happened and
tokens in order; a lost process fails its own group's streams alone, in time; nothing is held or
left behind afterwards. Each bound is the promise times LOADED, for a machine that does other work.
A fault counts only when at least COUNTED streams were in the middle of their answer.
"""

import os
import pathlib
import signal
import sys
import time
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import harness  # pylint: disable=wrong-import-position
import streams as st  # pylint: disable=wrong-import-position
from streams import COUNTED, FINISH_SECONDS, LOADED, STREAMS, TOKENS  # pylint: disable=C0413

STEP_DEADLINE_SECONDS = 5
KILLED_SECONDS = 2 * LOADED  # sooner than the peers of a lost rank could tell by themselves
HUNG_SECONDS = 2 * STEP_DEADLINE_SECONDS + LOADED
GONE_SECONDS = 5 * LOADED
RESTART_SECONDS = 60


class FaultTest(st.StreamChecks, harness.ModelTestCase):
    """One server per test: two ranks of the real model."""

    flags = ("--tp", "2", "--context", "1024", "--max-sequences", "32",
             "--step-deadline", f"{STEP_DEADLINE_SECONDS}s", "--log-level", "info")

    def setUp(self):
        harness.make_stubs()
        self.server = harness.Server(self.model, *self.flags)
        self.addCleanup(self.server.close)
        self.stopped = set()
        self.addCleanup(self.resume_all)

    def tearDown(self):
        outcome = self._outcome.result
        if outcome is not None and (outcome.failures or outcome.errors):
            print(self.server.log()[-3000:], file=sys.stderr)

    def pid_of(self, program):
        """Of nibble-gateway, or of the supervisor of the ranks."""
        pids = [pid for pid, line in self.server.descendants().items()
                if program in line.split()[0] and "--rank" not in line]
        self.assertEqual(len(pids), 1, pids)
        return pids[0]

    def stop(self, pid):
        os.kill(pid, signal.SIGSTOP)
        self.stopped.add(pid)

    def resume(self, pid):
        self.stopped.discard(pid)
        os.kill(pid, signal.SIGCONT)

    def resume_all(self):
        for pid in list(self.stopped):
            try:
                self.resume(pid)
            except ProcessLookupError:
                pass

    def open_streams(self, deadlines):
        """One stream per deadline, in seconds."""
        channel, streams = st.open_streams(self.server.address, deadlines)
        self.addCleanup(channel.close)
        return streams

    def start_streams(self):
        """STREAMS streams, at least COUNTED of them in the middle of their answer."""
        streams = self.open_streams([FINISH_SECONDS] * STREAMS)
        harness.wait_until(lambda: sum(stream.streaming for stream in streams) >= COUNTED, 60,
                           f"{COUNTED} streams are in the middle of their answer")
        return streams

    def check_cut_short(self, streams, fault_at, seconds):
        """All of them ended UNAVAILABLE, in time."""
        import grpc  # pylint: disable=import-outside-toplevel
        last = self.join(streams, seconds + FINISH_SECONDS)
        self.check(streams)
        cut = [stream for stream in streams if stream.code == grpc.StatusCode.UNAVAILABLE]
        others = [stream.code for stream in streams if stream not in cut]
        # What was finished already, or never begun and sent again, may have ended well.
        self.assertEqual([code for code in others if code != grpc.StatusCode.OK], [])
        self.assertGreaterEqual(len(cut), COUNTED)
        ended = max(stream.ended_at for stream in cut)
        print(f"{self.id()}: {len(cut)} streams cut short after {ended - fault_at:.2f} s, the last "
              f"of all ended after {last - fault_at:.2f} s")
        self.assertLess(ended - fault_at, seconds)

    def check_serves_again(self):
        """The same addresses answer, and nothing is held."""
        import grpc  # pylint: disable=import-outside-toplevel
        from nibble.inference.v1 import inference_pb2 as pb  # pylint: disable=C0415
        from nibble.inference.v1 import inference_pb2_grpc  # pylint: disable=C0415

        def answers():
            with grpc.insecure_channel(self.server.address) as channel:
                stub = inference_pb2_grpc.InferenceServiceStub(channel)
                try:
                    answer = stub.Generate(pb.GenerateRequest(
                        text="Hello", stopping=pb.StoppingCriteria(max_tokens=2)), timeout=10)
                    return len(answer.choices) == 1
                except grpc.RpcError:
                    return False
        harness.wait_until(answers, RESTART_SECONDS, "the server answers again")
        self.check_idle()

    def check_idle(self):
        for which, name, labels in (
                ("metrics", "nibble_gateway_requests_inflight", {}),
                ("metrics", "nibble_gateway_upstream_streams", {}),
                ("metrics", "nibble_gateway_stream_buffered_bytes", {}),
                ("worker_metrics", "nibble_requests_running", {}),
                ("worker_metrics", "nibble_requests_waiting", {}),
                ("worker_metrics", "nibble_slots_used", {}),
                ("worker_metrics", "nibble_steps_in_flight", {}),
                ("worker_metrics", "nibble_kv_cache_blocks", {"state": "used"}),
                ("worker_metrics", "nibble_kv_cache_blocks", {"state": "quarantined"})):
            harness.wait_until(lambda n=name, w=which, l=labels: self.server.metric(n, w, **l) == 0,
                               10, f"{name} {labels} is zero")

    def kill(self, pid, gone=()):
        """SIGKILL under load; streams end, `gone` with them, and the server serves again."""
        streams = self.start_streams()
        fault_at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        self.check_cut_short(streams, fault_at, KILLED_SECONDS)
        harness.wait_until(lambda: not set(gone) & set(self.server.descendants()), GONE_SECONDS,
                           "every process of the group has ended")
        self.check_serves_again()

    # ---- killed ----

    def test_killed_follower(self):
        ranks = self.server.ranks()
        self.kill(ranks[1], gone=ranks.values())

    def test_killed_leader(self):
        ranks = self.server.ranks()
        self.kill(ranks[0], gone=ranks.values())

    def test_killed_supervisor_of_the_ranks(self):
        ranks = self.server.ranks()
        self.kill(self.pid_of("nibble-worker"), gone=ranks.values())

    def test_killed_gateway(self):
        ranks = self.server.ranks()
        self.kill(self.pid_of("nibble-gateway"))
        self.assertEqual(self.server.ranks(), ranks)  # the group has not noticed

    def test_killed_serve(self):
        streams = self.start_streams()
        pids = set(self.server.descendants())
        fault_at = time.monotonic()
        self.server.process.kill()
        self.check_cut_short(streams, fault_at, KILLED_SECONDS)
        self.server.process.wait(timeout=GONE_SECONDS)
        harness.wait_until(lambda: not [pid for pid in pids if os.path.exists(f"/proc/{pid}/exe")
                                        and os.access(f"/proc/{pid}/exe", os.R_OK)],
                           GONE_SECONDS, "every process has ended")

    # ---- stopped: a rank that hangs ends its group, nobody else's standstill does ----

    def hang(self, rank):
        ranks = self.server.ranks()
        streams = self.start_streams()
        fault_at = time.monotonic()
        self.stop(ranks[rank])
        self.check_cut_short(streams, fault_at, HUNG_SECONDS)
        harness.wait_until(lambda: not set(ranks.values()) & set(self.server.descendants()),
                           GONE_SECONDS, "every process of the group has ended")
        harness.wait_until(lambda: "exit code 6" in self.server.log(), GONE_SECONDS,
                           "the log says that it was a hang")
        self.check_serves_again()

    def test_stopped_follower(self):
        self.hang(1)

    def test_stopped_leader(self):
        self.hang(0)

    def pause(self, pid):
        """Stopped for longer than a step deadline, then continued: no stream is lost."""
        ranks = self.server.ranks()
        streams = self.start_streams()
        self.stop(pid)
        time.sleep(STEP_DEADLINE_SECONDS * 1.5)
        self.resume(pid)
        self.check_all_ok(streams)
        self.assertEqual(self.server.ranks(), ranks)
        self.check_idle()

    def test_stopped_gateway(self):
        self.pause(self.pid_of("nibble-gateway"))

    def test_stopped_supervisor_of_the_ranks(self):
        self.pause(self.pid_of("nibble-worker"))

    def test_stopped_serve(self):
        self.pause(self.server.process.pid)

    # ---- clients ----

    def test_cancelled_streams_give_back_what_they_hold(self):
        import grpc  # pylint: disable=import-outside-toplevel
        streams = self.start_streams()
        for stream in streams[::2]:
            stream.call.cancel()
        self.join(streams, FINISH_SECONDS)
        for stream in streams[::2]:
            self.assertEqual(stream.code, grpc.StatusCode.CANCELLED)
        self.check(streams)
        self.assertEqual({stream.tokens for stream in streams[1::2]}, {TOKENS})
        self.check_idle()

    def test_cancelled_in_every_phase(self):
        """Before it is sent, while it waits or is tokenized, in its prompt, at each stage of its
        answer, at its last token and after its end."""
        import grpc  # pylint: disable=import-outside-toplevel
        others = self.start_streams()
        codes = {grpc.StatusCode.CANCELLED, grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
        for delay in (0, 0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0):
            batch = self.open_streams([FINISH_SECONDS] * 8)
            if delay:
                time.sleep(delay)
            for stream in batch:
                stream.call.cancel()
            self.join(batch, 10 * LOADED)
            self.assertLessEqual({stream.code for stream in batch}, codes)
            for stream in batch:
                self.assertEqual(stream.faults, [])
        for tokens in (1, 2, 40, TOKENS - 1, TOKENS):
            batch = self.open_streams([FINISH_SECONDS] * 2)
            harness.wait_until(lambda b=batch, t=tokens: all(s.tokens >= t for s in b),
                               FINISH_SECONDS, f"{tokens} tokens have come")
            for stream in batch:
                stream.call.cancel()
            self.join(batch, 10 * LOADED)
            self.assertLessEqual({stream.code for stream in batch}, codes)
        self.check_all_ok(others)
        self.check_idle()

    def test_a_storm_of_deadlines_gives_back_what_it_holds(self):
        import grpc  # pylint: disable=import-outside-toplevel
        first = self.start_streams()
        deadlines = [0.05 * (index + 1) for index in range(3 * STREAMS)]  # up to 3.6 s
        storm = self.open_streams(deadlines)
        self.join(storm, max(deadlines) + 1 * LOADED)
        for stream, seconds in zip(storm, deadlines):
            # More than the queue holds is refused; nothing ends later than a second after.
            self.assertIn(stream.code, (grpc.StatusCode.DEADLINE_EXCEEDED,
                                        grpc.StatusCode.RESOURCE_EXHAUSTED))
            self.assertLess(stream.ended_at - stream.began_at, seconds + 1 * LOADED)
        self.join(first, FINISH_SECONDS)
        self.check(first + storm)
        self.assertEqual({stream.tokens for stream in first}, {TOKENS})
        self.check_idle()


if __name__ == "__main__":
    unittest.main()
