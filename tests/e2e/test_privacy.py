"""What is asked, what is answered and what keys are stands nowhere that the processes write, at
their most talkative; and they look for nobody outside."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

import harness
import secured

# Lower case and in one piece, so that no tokenizer or template has a reason to change it.
PROMPT_MARK = "qzxvprompt"
KEY_MARK = "qzxvkey"
MODEL_MARK = "qzxvmodel"
ANSWER_CHARACTERS = 16


def await_end(call):
    import grpc  # pylint: disable=import-outside-toplevel
    try:
        return list(call) if hasattr(call, "__iter__") else [call]
    except grpc.RpcError as error:
        return error


class PrivacyTest(harness.ServedTestCase):
    start = secured.SecuredServer
    flags = ("--tp", "2", "--context", "2048", "--log-level", "trace")

    def requests(self, stub):
        """(what, call) of every kind of request, good and bad, with marks wherever a client can
        write text."""
        from nibble.inference.v1 import inference_pb2 as pb  # pylint: disable=C0415
        bearer = self.server.bearer()
        text = f"{PROMPT_MARK} once upon a time"
        stopping = pb.StoppingCriteria(max_tokens=48, ignore_eos=True, stop=[f"{PROMPT_MARK} stop"])
        good = pb.GenerateRequest(text=text, stopping=stopping,
                                  sampling=pb.SamplingParams(temperature=0))
        user = pb.ChatMessage(role="user", content=text, name=PROMPT_MARK)

        def stream(request, **options):
            return stub.GenerateStream(pb.GenerateStreamRequest(request=request),
                                       **{"metadata": bearer, "timeout": 60, **options})

        def unary(method, request):
            try:
                return [method(request, metadata=bearer, timeout=60)]
            except Exception as error:  # pylint: disable=broad-exception-caught
                return error

        yield "stream", await_end(stream(good))
        yield "unary", unary(stub.Generate, good)
        yield "chat", unary(stub.Chat, pb.ChatRequest(messages=[user], stopping=stopping,
                                                       sampling=pb.SamplingParams(temperature=0)))
        yield "bad role", unary(stub.Chat, pb.ChatRequest(
            messages=[pb.ChatMessage(role=PROMPT_MARK, content=text)]))
        yield "bad tools", unary(stub.Chat, pb.ChatRequest(
            messages=[user], tools_json=f'[{{"{PROMPT_MARK}": ]'))
        yield "tokenize", unary(stub.Tokenize, pb.TokenizeRequest(text=text))
        yield "detokenize", unary(stub.Detokenize, pb.DetokenizeRequest(token_ids=[1, 2, 3]))
        yield "unknown model", unary(stub.Generate, pb.GenerateRequest(model=MODEL_MARK, text=text))
        yield "too long", unary(stub.Generate, pb.GenerateRequest(text=text * 2000))
        yield "bad value", unary(stub.Generate, pb.GenerateRequest(
            text=text, sampling=pb.SamplingParams(temperature=-1)))
        yield "deadline", await_end(stream(
            pb.GenerateRequest(text=text, stopping=pb.StoppingCriteria(
                max_tokens=1500, ignore_eos=True)), timeout=0.3))
        for metadata in ([("authorization", f"Bearer nbl_{KEY_MARK}")],
                         [("authorization", f"Basic {KEY_MARK}")], []):
            yield "wrong key", await_end(stream(good, metadata=metadata))
        call = stream(pb.GenerateRequest(text=text, stopping=pb.StoppingCriteria(
            max_tokens=1500, ignore_eos=True)))
        next(iter(call))
        call.cancel()
        yield "cancelled", await_end(call)

    @staticmethod
    def answers(result):
        """Pieces of what was generated, long enough to be nobody else's."""
        text = ""
        for event in result if isinstance(result, list) else []:
            if hasattr(event, "delta"):
                text += event.delta.text
            for choice in getattr(event, "choices", ()):
                text += choice.text
        return re.findall(r"[^\n]{%d}" % ANSWER_CHARACTERS, text)[:4]

    def test_nothing_private_is_written(self):
        from nibble.inference.v1 import inference_pb2_grpc as rpc  # pylint: disable=C0415
        private = {PROMPT_MARK, KEY_MARK, MODEL_MARK, self.server.key, self.server.key[4:],
                   self.server.operator_key, self.server.high_key}
        errors, answered = [], 0
        with self.server.channel() as channel:
            for what, result in self.requests(rpc.InferenceServiceStub(channel)):
                pieces = self.answers(result)
                answered += bool(pieces)
                private.update(pieces)
                if not isinstance(result, list):
                    errors.append(f"{what}: {result.details()} {result.trailing_metadata()}")
        self.assertGreaterEqual(answered, 3, private)
        self.assertGreaterEqual(len(errors), 9, errors)
        self.server.end()
        written = {"log": self.server.log()}
        self.assertIn("trace", " ".join(self.server.process.args))
        self.assertGreater(written["log"].count("\n"), 20)
        for name, text in written.items():
            for secret in private:
                self.assertNotIn(secret, text, name)
        # What a client is told holds neither its prompt nor anybody's key, nor our paths.
        hidden = (PROMPT_MARK, KEY_MARK, self.server.key, str(self.model.parent),
                  str(self.server.security))
        for error in errors:
            for secret in hidden:
                self.assertNotIn(secret, error)

    def setUp(self):
        if self.server is not None and self.server.process.poll() is not None:
            self.fail(self.server.log())


class PagesTest(PrivacyTest):
    """The same for the HTTP pages, of a server of its own, which is still there to be asked."""

    def test_nothing_private_is_written(self):
        from nibble.inference.v1 import inference_pb2_grpc as rpc  # pylint: disable=C0415
        with self.server.channel() as channel:
            for _ in self.requests(rpc.InferenceServiceStub(channel)):
                pass
        hidden = (PROMPT_MARK, KEY_MARK, MODEL_MARK, self.server.key, str(self.model.parent),
                  str(self.server.security))
        for which in ("metrics", "worker_metrics"):
            for path in ("/metrics", "/", "/healthz", "/readyz"):
                text = harness.http_get(self.server.addresses[which], path)[1]
                for secret in hidden:
                    self.assertNotIn(secret, text, f"{which} {path}")


def unroutable():
    """How many packets or connections of this network namespace had nowhere to go."""
    count = 0
    lines = pathlib.Path("/proc/net/snmp").read_text(encoding="utf-8").splitlines()
    for names, values in zip(lines[::2], lines[1::2]):
        fields = dict(zip(names.split(), values.split()))
        if names.startswith("Ip:"):
            count += int(fields["OutNoRoutes"])
    for line in pathlib.Path("/proc/net/snmp6").read_text(encoding="utf-8").splitlines():
        name, value = line.split()
        if name == "Ip6OutNoRoutes":
            count += int(value)
    return count


def serve_alone(model):
    """Runs in a network namespace with nothing but loopback: serves and is asked there."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    harness.make_stubs()
    server = harness.Server(model, "--tp", "2", "--context", "2048", "--log-level", "debug")
    try:
        answer = harness.run_nibble("generate", "--server", server.address, "--max-tokens", "8",
                                    "--temperature", "0", "The capital of France is",
                                    env={"http_proxy": "", "grpc_proxy": ""})
        served = unroutable()
        # So that a zero means something.
        for address in ("192.0.2.1", "2001:db8::1"):
            subprocess.run([sys.executable, "-c",
                            "import socket,sys; a=sys.argv[1]; "
                            "socket.socket(socket.AF_INET6 if ':' in a else socket.AF_INET, "
                            "socket.SOCK_DGRAM).connect_ex((a, 9))", address], check=True)
        print(json.dumps({"answer": answer.stdout, "served": served, "tried": unroutable()}))
    finally:
        server.close()


class OutboundTest(harness.ModelTestCase):
    def test_nobody_outside_is_looked_for(self):
        if os.geteuid() != 0 or shutil.which("unshare") is None:
            print(f"NOT RUN: {self.id()} (needs root and unshare)", file=sys.stderr)
            return
        with tempfile.TemporaryDirectory():
            result = subprocess.run(
                ["unshare", "--net", sys.executable, __file__, "--alone", str(self.model)],
                capture_output=True, text=True, check=False, timeout=240,
                env={**os.environ, "http_proxy": "http://192.0.2.1:3128",
                     "grpc_proxy": "http://192.0.2.1:3128"})
        self.assertEqual(result.returncode, 0, result.stderr)
        seen = json.loads(result.stdout.strip().split("\n")[-1])
        self.assertIn("Paris", seen["answer"])
        self.assertEqual(seen["served"], 0)
        self.assertGreaterEqual(seen["tried"], 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--alone"]:
        serve_alone(pathlib.Path(sys.argv[2]))
    else:
        unittest.main()
