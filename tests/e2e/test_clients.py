"""Clients that other people wrote work against the server."""

import json
import subprocess
import time
import unittest

import harness


class GrpcurlTest(harness.ServedTestCase):
    """grpcurl through reflection; grpc-health-probe."""

    def grpcurl(self, *arguments):
        command = [harness.tool("grpcurl"), "-plaintext", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False,
                              timeout=harness.CALL_SECONDS)

    def test_lists_and_describes_services_by_reflection(self):
        listed = self.grpcurl(self.server.address, "list")
        self.assertEqual(listed.returncode, 0, listed.stderr)
        for service in ("nibble.inference.v1.InferenceService", "nibble.inference.v1.ModelService",
                        "grpc.health.v1.Health"):
            self.assertIn(service, listed.stdout.split())
        described = self.grpcurl(self.server.address, "describe",
                                 "nibble.inference.v1.GenerateRequest")
        self.assertIn("SamplingParams sampling", described.stdout)

    def test_streams_a_completion_by_reflection(self):
        request = {"request": {"text": "The capital of France is",
                               "sampling": {"temperature": 0}, "stopping": {"maxTokens": 8}}}
        answer = self.grpcurl("-d", json.dumps(request), self.server.address,
                              "nibble.inference.v1.InferenceService/GenerateStream")
        self.assertEqual(answer.returncode, 0, answer.stderr)
        decoder, events, text = json.JSONDecoder(), [], answer.stdout.strip()
        while text:
            event, end = decoder.raw_decode(text)
            events.append(event)
            text = text[end:].strip()
        self.assertIn("started", events[0])
        self.assertIn("finished", events[-1])
        said = "".join(event.get("delta", {}).get("text", "") for event in events)
        self.assertIn("Paris", said)

    def test_lists_models(self):
        answer = self.grpcurl(self.server.address, "nibble.inference.v1.ModelService/ListModels")
        self.assertEqual(answer.returncode, 0, answer.stderr)
        model = json.loads(answer.stdout)["models"][0]
        self.assertEqual(model["tensor_parallel"], 2)
        self.assertEqual(model["state"], "MODEL_STATE_READY")
        self.assertTrue(model["chat"])

    def test_health_probe_sees_liveness_and_readiness(self):
        for service in ("", "nibble.inference.v1.InferenceService"):
            probe = subprocess.run(
                [harness.tool("grpc-health-probe"), f"-addr={self.server.address}",
                 f"-service={service}"],
                capture_output=True, text=True, check=False, timeout=harness.CALL_SECONDS)
            self.assertEqual(probe.returncode, 0, f"{service}: {probe.stderr}")
            self.assertIn("SERVING", probe.stdout + probe.stderr)

    def test_probes_over_http(self):
        for which in ("metrics", "worker_metrics"):
            for path in ("/healthz", "/readyz"):
                self.assertEqual(harness.http_get(self.server.addresses[which], path)[0], 200)


class PythonClientTest(harness.ServedTestCase):
    """grpcio with stubs made from the contracts."""

    def request(self, **fields):
        from nibble.inference.v1 import inference_pb2 as pb  # pylint: disable=C0415
        sampling = pb.SamplingParams(temperature=fields.pop("temperature", 0))
        if "seed" in fields:
            sampling.seed = fields.pop("seed")
        if "n" in fields:
            sampling.n = fields.pop("n")
        stopping = pb.StoppingCriteria(max_tokens=fields.pop("max_tokens", 16),
                                       ignore_eos=fields.pop("ignore_eos", False),
                                       stop=fields.pop("stop", []))
        return pb.GenerateRequest(sampling=sampling, stopping=stopping, **fields)

    def stream(self, **fields):
        from nibble.inference.v1 import inference_pb2 as pb  # pylint: disable=C0415
        return self.inference().GenerateStream(
            pb.GenerateStreamRequest(request=self.request(**fields)),
            timeout=harness.CALL_SECONDS)

    def test_events_come_in_order_and_counts_agree(self):
        events = list(self.stream(text="Once upon a time", max_tokens=24, ignore_eos=True))
        kinds = [event.WhichOneof("event") for event in events]
        self.assertEqual(kinds[0], "started")
        self.assertEqual(kinds[-1], "finished")
        self.assertEqual(set(kinds[1:-1]), {"delta"})
        self.assertEqual(events[0].started.max_tokens, 24)
        finished = events[-1].finished
        self.assertEqual(finished.usage.completion_tokens, 24)
        self.assertEqual(events[-2].delta.completion_tokens, 24)
        self.assertEqual(finished.usage.prompt_tokens, events[0].started.prompt_tokens)

    def test_tokens_arrive_as_they_are_made(self):
        arrivals = []
        for event in self.stream(text="Count: one, two,", max_tokens=64, ignore_eos=True):
            if event.WhichOneof("event") == "delta":
                arrivals.append(time.monotonic())
        self.assertGreater(len(arrivals), 8)
        self.assertGreater(arrivals[-1] - arrivals[0], 0.05)

    def test_unary_and_stream_agree_and_seeds_repeat(self):
        fields = {"text": "A short story:", "temperature": 1, "seed": 11, "max_tokens": 24}
        streamed = "".join(event.delta.text for event in self.stream(**fields))
        once = self.inference().Generate(self.request(**fields), timeout=harness.CALL_SECONDS)
        self.assertEqual(once.choices[0].text, streamed)
        self.assertEqual(once.seed, 11)
        other = self.inference().Generate(self.request(**{**fields, "seed": 12}),
                                          timeout=harness.CALL_SECONDS)
        self.assertNotEqual(other.choices[0].text, streamed)

    def test_stop_string_is_not_delivered(self):
        text = "".join(event.delta.text for event in
                       self.stream(text="Count: one, two, three,", stop=[","], max_tokens=32))
        self.assertNotIn(",", text)

    def test_chat_and_several_choices(self):
        from nibble.inference.v1 import inference_pb2 as pb  # pylint: disable=C0415
        request = pb.ChatRequest(
            messages=[pb.ChatMessage(role="user", content="Say hello.")],
            sampling=pb.SamplingParams(temperature=0.8, seed=3, n=3),
            stopping=pb.StoppingCriteria(max_tokens=12))
        answer = self.inference().Chat(request, timeout=harness.CALL_SECONDS)
        self.assertEqual([choice.index for choice in answer.choices], [0, 1, 2])
        self.assertTrue(all(choice.text for choice in answer.choices))

    def test_tokenize_and_back(self):
        from nibble.inference.v1 import inference_pb2 as pb  # pylint: disable=C0415
        text = "Grüße, world 😀"
        ids = self.inference().Tokenize(pb.TokenizeRequest(text=text), timeout=10).token_ids
        back = self.inference().Detokenize(pb.DetokenizeRequest(token_ids=ids), timeout=10)
        self.assertEqual(back.text, text)

    def test_cancel_frees_what_the_request_held(self):
        stream = self.stream(text="Tell me everything.", max_tokens=1500, ignore_eos=True)
        for event in stream:
            if event.WhichOneof("event") == "delta":
                break
        stream.cancel()
        self.await_idle()

    def test_deadline_ends_a_request_and_frees_it(self):
        import grpc  # pylint: disable=C0415
        from nibble.inference.v1 import inference_pb2 as pb  # pylint: disable=C0415
        request = self.request(text="Tell me everything.", max_tokens=1900, ignore_eos=True)
        with self.assertRaises(grpc.RpcError) as caught:
            list(self.inference().GenerateStream(pb.GenerateStreamRequest(request=request),
                                                 timeout=0.5))
        self.assertEqual(caught.exception.code(), grpc.StatusCode.DEADLINE_EXCEEDED)
        self.await_idle()

    def test_example_client_works(self):
        example = harness.SOURCE / "examples" / "python" / "chat.py"
        result = subprocess.run(
            [harness.tool("python3") or "python3", str(example), "--server", self.server.address,
             "--stubs", str(harness.STUBS), "Say hello."],
            capture_output=True, text=True, check=False, timeout=harness.CALL_SECONDS)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertTrue(result.stdout.strip())


if __name__ == "__main__":
    unittest.main()
