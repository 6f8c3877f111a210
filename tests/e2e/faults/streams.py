"""Streams of a real model that check themselves as they are read, and what holds for all of them.

Every stream ends exactly once, with a status that says what happened; its tokens are counted and in
order; all ask the same question greedily, so that every text is the beginning of the longest one.
"""

import threading
import time

STREAMS = 24
COUNTED = 20  # a fault counts only when so many were in the middle of their answer
TOKENS = 300
LOADED = 2  # bounds are the promise times this, for a machine that does other work
FINISH_SECONDS = 240


class Stream:
    """One client's stream, checked as it is read."""

    def __init__(self, stub, request, seconds=FINISH_SECONDS, pause=0.0):
        self.pause = pause  # between two reads
        self.text = ""
        self.tokens = 0
        self.finished = 0
        self.code = None  # of the call's end
        self.ended_at = None
        self.faults = []  # of the contract
        self.sent = None  # the trailer x-tokens-sent
        self.began_at = time.monotonic()
        self.call = stub.GenerateStream(request, timeout=seconds)
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self):
        import grpc  # pylint: disable=import-outside-toplevel
        try:
            for event in self.call:
                if self.pause:
                    time.sleep(self.pause)
                if self.finished:
                    self.faults.append("an event after the end")
                which = event.WhichOneof("event")
                if which == "delta":
                    delta = event.delta
                    self.tokens += len(delta.token_ids)
                    if delta.completion_tokens != self.tokens:
                        self.faults.append(
                            f"{self.tokens} tokens came, {delta.completion_tokens} were counted")
                    self.text += delta.text
                elif which == "finished":
                    self.finished += 1
                    if event.finished.usage.completion_tokens != self.tokens:
                        self.faults.append("the usage is not what was delivered")
            self.code = grpc.StatusCode.OK
        except grpc.RpcError as error:
            self.code = error.code()
            trailers = dict(error.trailing_metadata() or ())
            self.sent = trailers.get("x-tokens-sent")
        self.ended_at = time.monotonic()

    @property
    def streaming(self):
        return self.tokens > 0 and self.code is None


def open_streams(address, deadlines, tokens=TOKENS, options=(), pause=0.0, alternatives=0,
                 seed=None):
    """One stream per deadline, in seconds; the channel and the streams."""
    import grpc  # pylint: disable=import-outside-toplevel
    from nibble.inference.v1 import inference_pb2 as pb  # pylint: disable=C0415
    from nibble.inference.v1 import inference_pb2_grpc  # pylint: disable=C0415
    channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1),
                                                      *options])
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    output = pb.OutputOptions(token_ids=True)
    if alternatives:
        output.logprobs = alternatives
    request = pb.GenerateStreamRequest(request=pb.GenerateRequest(
        text="Tell me a long story.", sampling=pb.SamplingParams(temperature=0, seed=seed),
        stopping=pb.StoppingCriteria(max_tokens=tokens, ignore_eos=True), output=output))
    return channel, [Stream(stub, request, seconds, pause) for seconds in deadlines]


class StreamChecks:
    """For a unittest.TestCase."""

    def join(self, streams, seconds):
        """Waits for every end; the time of the last."""
        deadline = time.monotonic() + seconds
        for stream in streams:
            stream.thread.join(max(0, deadline - time.monotonic()))
        self.assertFalse([stream for stream in streams if stream.code is None],
                         f"streams that have not ended after {seconds} s")
        return max(stream.ended_at for stream in streams)

    def check(self, streams):
        """What holds for every stream, however it ended."""
        import grpc  # pylint: disable=import-outside-toplevel
        for stream in streams:
            self.assertEqual(stream.faults, [])
            self.assertEqual(stream.finished, 1 if stream.code == grpc.StatusCode.OK else 0)
            if stream.sent is not None:
                self.assertEqual(int(stream.sent), stream.tokens)
        longest = max((stream.text for stream in streams), key=len)
        for stream in streams:
            self.assertTrue(longest.startswith(stream.text), (longest, stream.text))

    def check_all_ok(self, streams, tokens=TOKENS):
        """None of them has noticed anything."""
        import grpc  # pylint: disable=import-outside-toplevel
        self.join(streams, FINISH_SECONDS)
        self.check(streams)
        self.assertEqual({stream.code for stream in streams}, {grpc.StatusCode.OK})
        self.assertEqual({stream.tokens for stream in streams}, {tokens})
