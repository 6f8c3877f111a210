"""Bad requests end with a status that names every bad field, and the server goes on."""

import unittest

import harness


class BadInputTest(harness.ServedTestCase):

    def setUp(self):
        super().setUp()
        import grpc  # pylint: disable=C0415
        from nibble.inference.v1 import inference_pb2 as pb  # pylint: disable=C0415
        self.grpc, self.pb = grpc, pb

    def tearDown(self):
        # Whatever the test sent, the next request is served.
        answer = self.inference().Generate(self.request(), timeout=harness.CALL_SECONDS)
        self.assertEqual(len(answer.choices), 1)
        super().tearDown()

    def request(self, **fields):
        request = self.pb.GenerateRequest(text=fields.pop("text", "Hello"))
        request.stopping.max_tokens = 2
        for name, value in fields.items():
            setattr(request, name, value)
        return request

    def refused(self, request, *codes):
        """The error of a request that must be refused with one of `codes`."""
        with self.assertRaises(self.grpc.RpcError) as caught:
            self.inference().Generate(request, timeout=harness.CALL_SECONDS)
        self.assertIn(caught.exception.code(), codes, caught.exception.details())
        return caught.exception

    def violations(self, error):
        """{field: description} of the error's BadRequest."""
        from google.rpc import error_details_pb2, status_pb2  # pylint: disable=C0415
        status = status_pb2.Status()
        status.ParseFromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
        found = {}
        for detail in status.details:
            bad = error_details_pb2.BadRequest()
            if detail.Unpack(bad):
                found.update({entry.field: entry.description for entry in bad.field_violations})
        return found

    def test_every_field_out_of_range_is_named(self):
        cases = {
            "sampling.temperature": -1.0, "sampling.top_p": 1.5, "sampling.min_p": 2.0,
            "sampling.typical_p": 0.0, "sampling.presence_penalty": 3.0,
            "sampling.frequency_penalty": -3.0, "sampling.repetition_penalty": 0.0,
            "sampling.n": 4_000_000_000, "stopping.max_tokens": 0, "output.logprobs": 1_000_000,
        }
        for field, value in cases.items():
            with self.subTest(field=field):
                request = self.request()
                message, name = field.split(".")
                setattr(getattr(request, message), name, value)
                error = self.refused(request, self.grpc.StatusCode.INVALID_ARGUMENT)
                self.assertIn(field, self.violations(error))

    def test_all_bad_fields_are_named_at_once(self):
        request = self.request()
        request.sampling.temperature = float("nan")
        request.sampling.top_p = -1
        request.output.logprobs = 21
        request.stopping.stop.extend(["x"] * 17)
        error = self.refused(request, self.grpc.StatusCode.INVALID_ARGUMENT)
        self.assertLessEqual({"sampling.temperature", "sampling.top_p", "output.logprobs",
                              "stopping.stop"}, set(self.violations(error)))

    def test_list_fields(self):
        request = self.request()
        request.stopping.stop.append("")
        self.refused(request, self.grpc.StatusCode.INVALID_ARGUMENT)
        request = self.request()
        request.stopping.stop.append("x" * 257)
        self.refused(request, self.grpc.StatusCode.INVALID_ARGUMENT)
        request = self.request()
        request.stopping.stop_token_ids.append(4_294_967_295)
        self.refused(request, self.grpc.StatusCode.INVALID_ARGUMENT)
        request = self.request()
        request.sampling.logit_bias[4_294_967_295] = 1
        self.refused(request, self.grpc.StatusCode.INVALID_ARGUMENT)
        request = self.request()
        request.sampling.logit_bias[1] = float("inf")
        self.refused(request, self.grpc.StatusCode.INVALID_ARGUMENT)

    def test_prompts_that_cannot_be(self):
        invalid = self.grpc.StatusCode.INVALID_ARGUMENT
        exhausted = self.grpc.StatusCode.RESOURCE_EXHAUSTED
        self.refused(self.pb.GenerateRequest(), invalid)
        self.refused(self.request(text=""), invalid)
        self.refused(self.pb.GenerateRequest(token_ids=self.pb.TokenIds(ids=[])), invalid)
        self.refused(self.pb.GenerateRequest(token_ids=self.pb.TokenIds(ids=[2**32 - 1])), invalid)
        self.refused(self.request(text="many words " * 20_000), invalid, exhausted)
        self.refused(self.request(text="x" * 100_000_000), invalid, exhausted)

    def test_nul_bytes_are_text(self):
        answer = self.inference().Generate(self.request(text="a\0b"),
                                           timeout=harness.CALL_SECONDS)
        self.assertEqual(len(answer.choices), 1)

    def raw(self, method, data):
        """The code that bytes on the wire end with."""
        call = self.channel().unary_unary(
            f"/nibble.inference.v1.InferenceService/{method}",
            request_serializer=bytes, response_deserializer=bytes)
        try:
            call(data, timeout=harness.CALL_SECONDS)
            return self.grpc.StatusCode.OK
        except self.grpc.RpcError as error:
            return error.code()

    def test_bytes_that_are_no_message(self):
        invalid_utf8 = b"\x1a\x04\xff\xfe\xc0\x80"  # field 3, text
        self.assertEqual(self.raw("Generate", invalid_utf8),
                         self.grpc.StatusCode.INVALID_ARGUMENT)
        for data in (b"\xff" * 64, b"\x1a\xff\xff\xff\xff\x0f", bytes(range(256))):
            self.assertIn(self.raw("Generate", data),
                          (self.grpc.StatusCode.INVALID_ARGUMENT, self.grpc.StatusCode.INTERNAL))

    def test_unknown_fields_are_ignored(self):
        data = self.request().SerializeToString() + b"\xa2\x06\x03abc"  # field 100
        self.assertEqual(self.raw("Generate", data), self.grpc.StatusCode.OK)

    def test_unknown_model_and_method(self):
        self.refused(self.request(model="no-such-model"), self.grpc.StatusCode.NOT_FOUND)
        self.assertEqual(self.raw("NoSuchMethod", b""), self.grpc.StatusCode.UNIMPLEMENTED)

    def test_chat_fields(self):
        stub, pb = self.inference(), self.pb
        for request in (pb.ChatRequest(),
                        pb.ChatRequest(messages=[pb.ChatMessage(role="", content="x")]),
                        pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="x")],
                                       tools_json="{not json")):
            with self.assertRaises(self.grpc.RpcError) as caught:
                stub.Chat(request, timeout=harness.CALL_SECONDS)
            self.assertEqual(caught.exception.code(), self.grpc.StatusCode.INVALID_ARGUMENT)

    def test_detokenize_out_of_vocabulary(self):
        with self.assertRaises(self.grpc.RpcError) as caught:
            self.inference().Detokenize(self.pb.DetokenizeRequest(token_ids=[2**31]), timeout=10)
        self.assertEqual(caught.exception.code(), self.grpc.StatusCode.INVALID_ARGUMENT)


if __name__ == "__main__":
    unittest.main()
