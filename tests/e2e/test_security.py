"""Clients that other people wrote work with TLS and a key; without one they do not."""

import json
import subprocess
import unittest

import harness
import secured

HARMLESS = {"request": {"text": "The capital of France is", "sampling": {"temperature": 0},
                        "stopping": {"maxTokens": 8}}}
STREAM = "nibble.inference.v1.InferenceService/GenerateStream"


class SecurityTest(harness.ServedTestCase):
    start = secured.SecuredServer
    flags = ("--tp", "1", "--context", "2048", "--admin-listen", harness.LOCAL)

    def run_tool(self, name, *arguments):
        """A run of the tool, or None with a line that says so."""
        tool = harness.tool(name)
        if tool is None:
            print(f"NOT RUN: {self.id()} (no {name})", file=harness.sys.stderr)
            return None
        return subprocess.run([tool, *arguments], capture_output=True, text=True, check=False,
                              timeout=harness.CALL_SECONDS)

    def grpcurl(self, *flags, address=None, method=STREAM, proto="inference/v1/inference",
                data=None):
        return self.run_tool(
            "grpcurl", "-import-path", str(harness.SOURCE / "proto"), "-proto",
            f"nibble/{proto}.proto", "-d", json.dumps(HARMLESS if data is None else data), *flags,
            address or self.server.address, method)

    def test_grpcurl_with_tls_and_a_key(self):
        bearer = f"authorization: Bearer {self.server.key}"
        answer = self.grpcurl("-cacert", self.server.ca, "-H", bearer)
        if answer is None:
            return
        self.assertEqual(answer.returncode, 0, answer.stderr)
        self.assertIn("Paris", answer.stdout)
        for flags, said in ((("-cacert", self.server.ca), "Unauthenticated"),
                            (("-cacert", self.server.ca, "-H", bearer + "x"), "Unauthenticated"),
                            (("-plaintext", "-max-time", "5", "-H", bearer), ""),
                            (("-H", bearer), "certificate")):
            refused = self.grpcurl(*flags)
            self.assertNotEqual(refused.returncode, 0, flags)
            self.assertIn(said, refused.stdout + refused.stderr)

    def test_reflection_is_off(self):
        listed = self.run_tool("grpcurl", "-cacert", self.server.ca, "-H",
                               f"authorization: Bearer {self.server.key}", self.server.address,
                               "list")
        if listed is not None:
            self.assertNotEqual(listed.returncode, 0)
            self.assertIn("reflection", listed.stderr)

    def test_health_probe_with_tls_and_without_a_key(self):
        flags = [f"-addr={self.server.address}", "-service=nibble.inference.v1.InferenceService"]
        probe = self.run_tool("grpc-health-probe", *flags, "-tls",
                              f"-tls-ca-cert={self.server.ca}")
        if probe is None:
            return
        self.assertEqual(probe.returncode, 0, probe.stderr)
        self.assertNotEqual(self.run_tool("grpc-health-probe", *flags).returncode, 0)

    def test_admin_service_wants_an_operators_key(self):
        for key, code in ((self.server.operator_key, 0), (self.server.key, None), ("", None)):
            flags = ["-H", f"authorization: Bearer {key}"] if key else []
            answer = self.grpcurl("-cacert", self.server.ca, *flags,
                                  address=self.server.addresses["admin"],
                                  method="nibble.admin.v1.AdminService/GetServerInfo",
                                  proto="admin/v1/admin", data={})
            if answer is None:
                return
            self.assertEqual(answer.returncode == 0, code == 0, answer.stderr)

    def test_nibble_commands_with_tls_and_a_key(self):
        arguments = ["generate", "--server", self.server.address, "--max-tokens", "8",
                     "--temperature", "0", "The capital of France is"]
        key = {"NIBBLE_API_KEY": self.server.key}
        answer = harness.run_nibble(*arguments, "--tls-ca", self.server.ca, env=key)
        self.assertEqual(answer.returncode, 0, answer.stderr)
        self.assertIn("Paris", answer.stdout)
        keyless = harness.run_nibble(*arguments, "--tls-ca", self.server.ca)
        self.assertEqual(keyless.returncode, 1)
        self.assertIn("UNAUTHENTICATED", keyless.stderr)
        clear = harness.run_nibble(*arguments, "--timeout", "5s", env=key)
        self.assertEqual(clear.returncode, 1)
        unknown = harness.run_nibble(*arguments, "--tls", "--timeout", "5s", env=key)
        self.assertEqual(unknown.returncode, 1)
        missing = harness.run_nibble(*arguments, "--tls-ca", "/nowhere/ca.pem", env=key)
        self.assertEqual(missing.returncode, 2)
        self.assertIn("/nowhere/ca.pem", missing.stderr)

    def test_tenants_are_counted(self):
        from nibble.inference.v1 import inference_pb2 as pb  # pylint: disable=C0415
        from nibble.inference.v1 import inference_pb2_grpc as rpc  # pylint: disable=C0415
        before = self.server.metric("nibble_gateway_tenant_tokens_total", tenant="bob",
                                    type="generated")
        with self.server.channel() as channel:
            answer = rpc.InferenceServiceStub(channel).Generate(
                pb.GenerateRequest(text="Once upon a time",
                                   stopping=pb.StoppingCriteria(max_tokens=5, ignore_eos=True)),
                timeout=harness.CALL_SECONDS, metadata=self.server.bearer(self.server.high_key))
        self.assertEqual(answer.usage.completion_tokens, 5)
        self.assertEqual(self.server.metric("nibble_gateway_tenant_tokens_total", tenant="bob",
                                            type="generated") - before, 5)

    def test_bad_security_files_are_named_before_anything_starts(self):
        text = self.server.keys_file
        for flags, said in ((("--tls-cert", "/nowhere.pem", "--tls-key", self.server.ca),
                             "tls.cert \"/nowhere.pem\""),
                            (("--tls-client-ca", self.server.ca), "tls.cert is not set"),
                            (("--tls-cert", self.server.ca, "--tls-key", text), "tls.key"),
                            (("--keys-file", self.server.ca), self.server.ca)):
            refused = harness.run_nibble("serve", self.model, "--port", "0", *flags)
            self.assertEqual(refused.returncode, 2, refused.stderr)
            self.assertIn(said, refused.stderr)
            self.assertEqual(len(refused.stderr.strip().split("\n")), 1, refused.stderr)


if __name__ == "__main__":
    unittest.main()
