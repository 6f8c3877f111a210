"""A group lives and dies as one; serve starts it again; a drain loses nothing."""

import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import tempfile
import threading
import time
import unittest

import harness

GROUP_END_SECONDS_MAX = 5
RESTART_SECONDS_MAX = 60
BEATS = 9


class BeatTest(unittest.TestCase):

    def test_a_leader_tells_its_load_four_times_a_second(self):
        """What a silent group is known by, and what requests are routed by."""
        import grpc  # pylint: disable=C0415
        harness.make_stubs()
        from nibble.worker.v1 import worker_pb2, worker_pb2_grpc  # pylint: disable=C0415
        folder = pathlib.Path(tempfile.mkdtemp(prefix="nibble-beats-"))
        self.addCleanup(shutil.rmtree, folder)
        announce = folder / "announce.json"
        leader = subprocess.Popen(  # pylint: disable=consider-using-with
            [str(harness.BUILD / "bin" / "fake_worker"), "--listen", harness.LOCAL, "--announce",
             str(announce)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        self.addCleanup(leader.wait)
        self.addCleanup(leader.kill)
        harness.wait_until(announce.exists, harness.READY_SECONDS_MAX, "the leader is ready")
        address = json.loads(announce.read_text(encoding="utf-8"))["grpc"]
        with grpc.insecure_channel(address) as channel:
            beats = worker_pb2_grpc.WorkerServiceStub(channel).WatchLoad(
                worker_pb2.WatchLoadRequest(), timeout=harness.CALL_SECONDS)
            came = [time.monotonic() for _, _ in zip(range(BEATS), beats)]
            beats.cancel()
        gaps = [after - before for before, after in zip(came, came[1:])]
        self.assertLess(abs(statistics.median(gaps) - 0.25), 0.1, gaps)


class FailureTest(harness.ServedTestCase):

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.first = cls.server

    def stream(self, tokens):
        from nibble.inference.v1 import inference_pb2 as pb  # pylint: disable=C0415
        request = pb.GenerateRequest(
            text="Tell me a long story.", sampling=pb.SamplingParams(temperature=0),
            stopping=pb.StoppingCriteria(max_tokens=tokens, ignore_eos=True))
        return self.inference().GenerateStream(pb.GenerateStreamRequest(request=request),
                                               timeout=harness.CALL_SECONDS)

    def answers(self):
        """Whether a short request succeeds now."""
        import grpc  # pylint: disable=C0415
        try:
            return [event for event in self.stream(2)][-1].WhichOneof("event") == "finished"
        except grpc.RpcError:
            return False

    def kill_mid_stream(self, rank):
        """Kills a rank under a stream; the stream's error and when it came."""
        import grpc  # pylint: disable=C0415
        stream = self.stream(1500)
        pids = self.server.ranks()
        self.assertEqual(sorted(pids), [0, 1])
        killed = None
        with self.assertRaises(grpc.RpcError) as caught:
            deltas = 0
            for event in stream:
                deltas += event.WhichOneof("event") == "delta"
                if deltas == 3 and killed is None:
                    killed = time.monotonic()
                    os.kill(pids[rank], signal.SIGKILL)
        self.assertIsNotNone(killed)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.UNAVAILABLE)
        self.assertLess(time.monotonic() - killed, GROUP_END_SECONDS_MAX)
        return pids

    def test_killed_ranks_end_their_group_and_serve_restarts_it(self):
        for rank in (1, 0):
            with self.subTest(rank=rank):
                before = self.kill_mid_stream(rank)
                harness.wait_until(
                    lambda: not set(before.values()) & set(self.server.ranks().values()),
                    GROUP_END_SECONDS_MAX, "every rank of the group has ended")
                harness.wait_until(self.answers, RESTART_SECONDS_MAX, "the group serves again")
                self.assertEqual(sorted(self.server.ranks()), [0, 1])
        self.assertIsNone(self.server.process.poll())


class DrainTest(harness.ServedTestCase):

    def test_sigterm_finishes_what_runs_and_exits_0(self):
        from nibble.inference.v1 import inference_pb2 as pb  # pylint: disable=C0415
        request = pb.GenerateRequest(
            text="Count to a hundred.", sampling=pb.SamplingParams(temperature=0),
            stopping=pb.StoppingCriteria(max_tokens=200, ignore_eos=True))
        stream = self.inference().GenerateStream(pb.GenerateStreamRequest(request=request),
                                                 timeout=harness.CALL_SECONDS)
        events = [next(stream), next(stream)]
        codes = []
        ending = threading.Thread(target=lambda: codes.append(self.server.end()))
        ending.start()
        events += list(stream)
        ending.join(harness.END_SECONDS_MAX)
        self.assertEqual(events[-1].WhichOneof("event"), "finished")
        self.assertEqual(events[-1].finished.usage.completion_tokens, 200)
        self.assertEqual(codes, [0], self.server.log())

    def setUp(self):
        pass


class OwnerTest(harness.ServedTestCase):

    def test_a_killed_serve_leaves_no_process(self):
        pids = set(self.server.descendants())
        self.assertGreaterEqual(len(pids), 4)  # gateway, supervisor, two ranks
        self.server.process.kill()
        self.server.process.wait(timeout=harness.END_SECONDS_MAX)
        harness.wait_until(lambda: not any(os.path.exists(f"/proc/{pid}/exe") and
                                           os.access(f"/proc/{pid}/exe", os.R_OK)
                                           for pid in pids),
                           GROUP_END_SECONDS_MAX, "every process of the server has ended")

    def setUp(self):
        pass


if __name__ == "__main__":
    unittest.main()
