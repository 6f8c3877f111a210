"""The demo's own model, from its GGUF file to its tokens: what PyTorch and numpy gave for it."""

import hashlib
import json
import pathlib
import struct
import sys
import tempfile
import unittest

import harness

FP16 = harness.SOURCE / ".cache" / "models" / "smollm2-135m"
GOLDENS = harness.SOURCE / "tests" / "data" / "demo-model-goldens"
QUANTIZE_SECONDS_MAX = 240
LOGPROB_DIFFERENCE_MAX = 2e-3


def tensor_hashes(folder):
    """{tensor: SHA-256 of its bytes} of every safetensors file in `folder`."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                begin, end = entry["data_offsets"]
                file.seek(8 + length + begin)
                found[name] = hashlib.sha256(file.read(end - begin)).hexdigest()
    return found


class DemoModelTest(unittest.TestCase):
    """Quantized by this build, then served on two ranks with three KV heads: uneven shares."""

    def run(self, result=None):
        if not (FP16 / ".complete").exists():
            print(f"NOT RUN: {self.id()} (no {FP16}; tools/models/fetch_demo_model.sh gets it)",
                  file=sys.stderr)
            return result
        return super().run(result)

    @classmethod
    def setUpClass(cls):
        if not (FP16 / ".complete").exists():
            return
        harness.make_stubs()
        scratch = tempfile.TemporaryDirectory(prefix="nibble-demo-model-")
        cls.addClassCleanup(scratch.cleanup)
        cls.folder = pathlib.Path(scratch.name) / "awq"
        answer = harness.run_nibble("quantize", "--method", "rtn", "--group-size", "64", FP16,
                                    cls.folder, seconds=QUANTIZE_SECONDS_MAX)
        assert answer.returncode == 0, answer.stderr

    def test_quantizing_gives_the_bytes_that_numpy_gave(self):
        expected = json.loads((GOLDENS / "checkpoint.json").read_text(encoding="utf-8"))
        self.assertEqual(tensor_hashes(self.folder), expected["sha256"])

    def test_two_exact_ranks_give_the_tokens_of_the_reference(self):
        import grpc  # pylint: disable=import-outside-toplevel
        from nibble.inference.v1 import (  # pylint: disable=import-outside-toplevel
            inference_pb2 as pb, inference_pb2_grpc)
        server = harness.Server(self.folder, "--tp", "2", "--context", "512", "--numerics", "exact")
        self.addCleanup(server.close)
        goldens = json.loads((GOLDENS / "goldens.json").read_text(encoding="utf-8"))
        with grpc.insecure_channel(server.address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            for golden in goldens["prompts"]:
                expected = golden["generated_token_ids"]
                request = pb.GenerateRequest(
                    token_ids=pb.TokenIds(ids=golden["prompt_token_ids"]),
                    sampling=pb.SamplingParams(temperature=0),
                    stopping=pb.StoppingCriteria(max_tokens=len(expected),
                                                 ignore_eos=True),
                    output=pb.OutputOptions(logprobs=1, token_ids=True))
                with self.subTest(prompt=golden["name"]):
                    answer = stub.Generate(request, timeout=harness.CALL_SECONDS)
                    choice = answer.choices[0]
                    self.assertEqual(list(choice.token_ids), expected)
                    for step, given in zip(golden["steps"], choice.logprobs, strict=True):
                        self.assertAlmostEqual(given.sampled.logprob, step["top5"][0][1],
                                               delta=LOGPROB_DIFFERENCE_MAX)
        self.assertEqual(server.end(), 0)


if __name__ == "__main__":
    unittest.main()
