"""The example clients in C++ and Go build as their readers would build them, and work."""

import os
import shutil
import subprocess
import sys
import unittest

import harness
import secured

EXAMPLES = harness.SOURCE / "examples"
OUTPUT = harness.BUILD / "examples"
BUILD_SECONDS = 240


class ExampleTest(harness.ServedTestCase):
    flags = ("--tp", "1", "--context", "2048")
    secure = None

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        if cls.model is not None:
            cls.secure = secured.SecuredServer(cls.model, *cls.flags)

    @classmethod
    def tearDownClass(cls):
        if cls.secure is not None:
            cls.secure.close()
        super().tearDownClass()

    def run_in(self, folder, *words, seconds=BUILD_SECONDS, **env):
        result = subprocess.run([str(word) for word in words], cwd=folder, capture_output=True,
                                text=True, check=False, timeout=seconds,
                                env={**os.environ, **env})
        self.assertEqual(result.returncode, 0, f"{words}: {result.stdout}{result.stderr}")
        return result

    def ask_secured(self, *words):
        """The client's answer with TLS and a key; without the key it is told so."""
        key = {"NIBBLE_API_KEY": self.secure.key}
        self.check_answer(self.run_in(OUTPUT, *words, seconds=harness.CALL_SECONDS, **key))
        refused = subprocess.run([str(word) for word in words], cwd=OUTPUT, capture_output=True,
                                 text=True, check=False, timeout=harness.CALL_SECONDS)
        self.assertEqual(refused.returncode, 1, refused.stdout)
        self.assertIn("a key is needed", refused.stderr)

    def check_answer(self, result):
        self.assertTrue(result.stdout.strip())
        self.assertRegex(result.stderr, r"\[\d+ \+ \d+ tokens\]")

    def test_cpp_client_builds_and_works(self):
        cached = ["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"] if shutil.which("ccache") else []
        self.run_in(EXAMPLES / "cpp", "cmake", "-S", ".", "-B", OUTPUT / "cpp", "-G", "Ninja",
                    *cached)
        self.run_in(EXAMPLES / "cpp", "cmake", "--build", OUTPUT / "cpp")
        self.check_answer(self.run_in(OUTPUT, OUTPUT / "cpp" / "chat_example", "Say hello.",
                                      self.server.address, seconds=harness.CALL_SECONDS))
        self.ask_secured(OUTPUT / "cpp" / "chat_example", "Say hello.", self.secure.address,
                         self.secure.ca)

    def test_python_client_works_with_tls_and_a_key(self):
        OUTPUT.mkdir(parents=True, exist_ok=True)
        self.ask_secured(sys.executable, EXAMPLES / "python" / "chat.py", "--server",
                         self.secure.address, "--ca", self.secure.ca, "--stubs", harness.STUBS,
                         "--max-tokens", "16", "Say hello.")

    def test_go_client_builds_and_works(self):
        go = harness.tool("go")
        if go is None:
            print("NOT RUN: test_go_client_builds_and_works (no go)", file=sys.stderr)
            return
        folder, binaries = EXAMPLES / "go", OUTPUT / "go"
        flags = {"GOFLAGS": "-modcacherw -buildvcs=false", "GOBIN": str(binaries),
                 "PATH": os.pathsep.join([str(binaries), os.environ["PATH"]])}
        self.run_in(folder, go, "install", "tool", **flags)
        self.run_in(folder, go, "generate", **flags)
        self.run_in(folder, go, "vet", ".", **flags)
        self.run_in(folder, go, "build", "-o", binaries / "chat", ".", **flags)
        self.check_answer(self.run_in(OUTPUT, binaries / "chat", "-server", self.server.address,
                                      "-max-tokens", "16", "Say hello.",
                                      seconds=harness.CALL_SECONDS))
        self.ask_secured(binaries / "chat", "-server", self.secure.address, "-ca", self.secure.ca,
                         "-max-tokens", "16", "Say hello.")


if __name__ == "__main__":
    unittest.main()
