"""The nibble command: what it prints, what it refuses, its exit codes."""

import json
import pathlib
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
import unittest

import harness

COMMANDS = ("serve", "chat", "generate", "drain", "undrain", "inspect", "plan", "quantize",
            "bench")


class HelpTest(unittest.TestCase):

    def test_every_command_has_help_with_an_example(self):
        overview = harness.run_nibble("--help")
        self.assertEqual(overview.returncode, 0)
        for command in COMMANDS:
            self.assertIn(f"  {command}", overview.stdout)
            answer = harness.run_nibble(command, "--help")
            self.assertEqual(answer.returncode, 0)
            self.assertRegex(answer.stdout, rf"Example:\n  nibble {command} ")

    def test_version_names_the_build(self):
        for program in ("nibble", "nibble-worker", "nibble-gateway"):
            answer = subprocess.run([str(harness.BUILD / "bin" / program), "--version"],
                                    capture_output=True, text=True, check=False, timeout=10)
            self.assertEqual(answer.returncode, 0)
            self.assertRegex(answer.stdout, rf"^{program} \d+\.\d+\.\d+ \(.+\)\n$")

    def test_unknown_commands_and_no_command(self):
        self.assertEqual(harness.run_nibble("sreve").returncode, 2)
        self.assertEqual(harness.run_nibble().returncode, 2)


class DrainTest(unittest.TestCase):

    def test_drain_and_undrain_reach_the_admin_service(self):
        with tempfile.TemporaryDirectory() as folder:
            announce = pathlib.Path(folder) / "where.json"
            with subprocess.Popen(
                    [str(harness.BUILD / "bin" / "nibble-gateway"), "--groups", "127.0.0.1:1",
                     "--listen", harness.LOCAL, "--metrics-listen", harness.LOCAL,
                     "--admin-listen", harness.LOCAL, "--log-level", "off", "--announce",
                     str(announce)]) as gateway:
                try:
                    harness.wait_until(announce.exists, 30, "the gateway is there")
                    where = json.loads(announce.read_text(encoding="utf-8"))

                    def await_draining(wanted):
                        def shown():
                            page = harness.http_get(where["metrics"], "/metrics")[1]
                            page = harness.parse_metrics(page)
                            return page["nibble_gateway_draining"][0][1] == wanted
                        harness.wait_until(shown, 10, f"nibble_gateway_draining is {wanted}")
                    answer = harness.run_nibble("drain", "--server", where["admin"], "--wait", "9s")
                    self.assertEqual((answer.returncode, answer.stdout),
                                     (0, "draining, 0 requests in flight\n"), answer.stderr)
                    await_draining(1)
                    answer = harness.run_nibble("undrain", "--server", where["admin"])
                    self.assertEqual((answer.returncode, answer.stdout), (0, "taking work\n"))
                    await_draining(0)
                finally:
                    gateway.kill()
        answer = harness.run_nibble("drain", "--server", "127.0.0.1:1")
        self.assertEqual(answer.returncode, 1)
        self.assertEqual(len(answer.stderr.strip().splitlines()), 1, answer.stderr)


class ConfigTest(harness.ModelTestCase):

    def refused(self, *arguments, env=None):
        answer = harness.run_nibble("serve", self.model, *arguments, env=env)
        self.assertEqual(answer.returncode, 2, answer.stderr)
        self.assertEqual(len(answer.stderr.strip().splitlines()), 1, answer.stderr)
        self.assertEqual(answer.stdout, "")
        return answer.stderr

    def test_flags_environment_and_file_say_the_same(self):
        for arguments, env in ((("--tp", "65"), None), ((), {"NIBBLE_TP": "65"})):
            self.assertRegex(self.refused(*arguments, env=env),
                             r'tp is "65" \(from .*\); allowed: 1 to 64')
        with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
            file.write("[serve]\ntp = 65\n")
            file.flush()
            self.assertIn('tp is "65"', self.refused("--config", file.name))
            file.seek(0)
            file.write("[serve]\ntpp = 2\n")
            file.flush()
            self.assertIn("unknown key serve.tpp", self.refused("--config", file.name))

    def test_bad_values_are_one_line_and_exit_code_2(self):
        for arguments in (("--port", "x"), ("--memory", "lots"), ("--numerics", "slow"),
                          ("--drain-timeout", "10"), ("--step-deadline", "499ms"),
                          ("--metrics-listen", "nowhere"),
                          ("--unknown", "1"), ("--tp", "64"), ("--context", "9999999")):
            with self.subTest(arguments=arguments):
                self.refused(*arguments)

    def test_a_device_that_the_build_lacks_is_refused_before_anything_starts(self):
        self.assertIn("no GPU support", self.refused("--device", "cuda"))
        for arguments in (("plan", self.model, "--device", "cuda"),
                          ("bench", "--random", "smollm2", "--device", "cuda"),
                          ("bench", "--random", "smollm2"), ("bench",)):
            with self.subTest(arguments=arguments):
                answer = harness.run_nibble(*arguments)
                self.assertEqual(answer.returncode, 2, answer.stderr)
                self.assertEqual(len(answer.stderr.strip().splitlines()), 1, answer.stderr)

    def test_model_and_memory_have_their_own_codes(self):
        with tempfile.TemporaryDirectory() as empty:
            answer = harness.run_nibble("serve", empty)
            self.assertEqual(answer.returncode, 3, answer.stderr)
        for contents in (None, "{"):
            with self.subTest(tokenizer=contents), tempfile.TemporaryDirectory() as folder:
                copy = pathlib.Path(folder) / "model"
                shutil.copytree(self.model, copy, copy_function=shutil.copyfile,
                                ignore=shutil.ignore_patterns("tokenizer.json"))
                if contents is not None:
                    copy.chmod(0o755)
                    (copy / "tokenizer.json").write_text(contents, encoding="utf-8")
                answer = harness.run_nibble("serve", copy)
                self.assertEqual(answer.returncode, 3, answer.stderr)
                self.assertIn("tokenizer.json", answer.stderr)
        answer = harness.run_nibble("serve", self.model, "--kv-blocks", 1 << 28)
        self.assertEqual(answer.returncode, 4, answer.stderr)
        self.assertIn("this machine has", answer.stderr)
        answer = harness.run_nibble("serve", self.model, "--memory", "20MiB")
        self.assertEqual(answer.returncode, 4, answer.stderr)
        self.assertRegex(answer.stderr, r"needs \S+MiB: weights \S+MiB.*the budget is 20MiB")

    def test_a_port_that_is_taken_ends_with_code_2(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            answer = harness.run_nibble(
                "serve", self.model, "--port", port, "--metrics-listen", harness.LOCAL,
                "--worker-metrics-listen", harness.LOCAL, seconds=harness.READY_SECONDS_MAX)
        self.assertEqual(answer.returncode, 2, answer.stderr)


class FolderTest(harness.ModelTestCase):

    def test_inspect_says_what_the_folder_holds(self):
        answer = harness.run_nibble("inspect", self.model)
        self.assertEqual(answer.returncode, 0, answer.stderr)
        for words in ("LlamaForCausalLM", "30 layers", "9 query heads over 3 KV heads",
                      "groups of 64", "vocabulary 49152"):
            self.assertIn(words, answer.stdout)
        self.assertRegex(answer.stdout, r"(?m)^2\s+uneven\b")
        self.assertRegex(answer.stdout, r"(?m)^3\s+even\b")

    def test_plan_says_what_fits_and_refuses_with_numbers(self):
        answer = harness.run_nibble("plan", self.model, "--tp", "2", "--context", "2048",
                                    "--memory", "1GiB")
        self.assertEqual(answer.returncode, 0, answer.stderr)
        self.assertRegex(answer.stdout, r"fit at once: [1-9]")
        answer = harness.run_nibble("plan", self.model, "--memory", "50MiB")
        self.assertEqual(answer.returncode, 4)
        self.assertRegex(answer.stderr, r"rank 0 of 1 needs \S+MiB")

    def test_damaged_folders_are_refused_by_name(self):
        with tempfile.TemporaryDirectory() as folder:
            copy = pathlib.Path(folder) / "model"
            shutil.copytree(self.model, copy, copy_function=shutil.copyfile)
            copy.chmod(0o755)
            weights = sorted(copy.glob("*.safetensors"))[0]
            with open(weights, "r+b") as file:
                file.truncate(weights.stat().st_size - 1)
            answer = harness.run_nibble("inspect", copy)
            self.assertEqual(answer.returncode, 3)
            self.assertIn(weights.name, answer.stderr)

    def test_quantize_makes_a_folder_that_can_be_served(self):
        fp16 = harness.SOURCE / ".cache" / "models" / "smollm2-135m"
        if not (fp16 / ".complete").exists():
            print(f"NOT RUN: {self.id()} (no {fp16}; make demo fetches it)")
            return
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder) / "awq"
            answer = harness.run_nibble("quantize", "--method", "rtn", "--group-size", "64", fp16,
                                        out, seconds=240)
            self.assertEqual(answer.returncode, 0, answer.stderr)
            inspected = harness.run_nibble("inspect", out)
            self.assertIn("groups of 64", inspected.stdout)
            again = harness.run_nibble("quantize", "--group-size", "64", fp16, out)
            self.assertEqual(again.returncode, 2)
        self.assertEqual(harness.run_nibble("quantize", self.model, "/nowhere/out").returncode, 3)

    def test_bench_measures_and_writes_json(self):
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder) / "bench.json"
            answer = harness.run_nibble("bench", self.model, "--batches", "1", "--prompts", "64",
                                        "--runs", "1", "--decode-tokens", "8", "--json", out,
                                        seconds=240)
            self.assertEqual(answer.returncode, 0, answer.stderr)
            records = json.loads(out.read_text(encoding="utf-8"))
            metrics = {record["metric"] for record in records}
            self.assertTrue(any("decode" in metric for metric in metrics), metrics)
            self.assertTrue(any("prefill" in metric for metric in metrics), metrics)
            self.assertTrue(all(record["value"] > 0 for record in records))


class ClientCommandTest(harness.ServedTestCase):

    def test_generate_prints_the_continuation(self):
        answer = harness.run_nibble("generate", "--server", self.server.address, "--max-tokens",
                                    "8", "--temperature", "0", "--stats",
                                    "The capital of France is")
        self.assertEqual(answer.returncode, 0, answer.stderr)
        self.assertIn("Paris", answer.stdout)
        self.assertRegex(answer.stderr, r"\d+ prompt tokens, 8 tokens, first after")

    def test_chat_answers_one_question_or_standard_input(self):
        once = harness.run_nibble("chat", "--server", self.server.address, "--max-tokens", "12",
                                  "--temperature", "0", "Say hello.")
        self.assertEqual(once.returncode, 0, once.stderr)
        self.assertTrue(once.stdout.strip())
        piped = subprocess.run(
            [str(harness.NIBBLE), "chat", "--server", self.server.address, "--max-tokens", "12",
             "--temperature", "0"], input="Say hello.", capture_output=True, text=True,
            check=False, timeout=harness.CALL_SECONDS)
        self.assertEqual(piped.stdout, once.stdout)

    def test_errors_are_named_and_exit_code_1(self):
        answer = harness.run_nibble("generate", "--server", self.server.address, "--model",
                                    "no-such", "x")
        self.assertEqual(answer.returncode, 1)
        self.assertIn("NOT_FOUND", answer.stderr)
        answer = harness.run_nibble("generate", "--server", "127.0.0.1:1", "x")
        self.assertEqual(answer.returncode, 1)
        self.assertIn("nibble serve", answer.stderr)

    def test_what_stays_on_this_machine_goes_through_no_proxy(self):
        nobody = "http://127.0.0.1:1"
        port = self.server.address.rsplit(":", 1)[1]
        for address in (self.server.address, f"localhost:{port}", f"dns:///127.0.0.1:{port}",
                        f"ipv4:127.0.0.1:{port}"):
            with self.subTest(address=address):
                answer = harness.run_nibble(
                    "generate", "--server", address, "--max-tokens", "2", "x",
                    env={"http_proxy": nobody, "https_proxy": nobody, "grpc_proxy": nobody,
                         "no_proxy": "", "no_grpc_proxy": ""})
                self.assertEqual(answer.returncode, 0, answer.stderr)

    def test_examples_of_help_work_as_pasted(self):
        demo = harness.SOURCE / ".cache" / "models" / "smollm2-135m-awq"
        for command in ("chat", "generate", "inspect", "plan", "bench"):
            words = self.example_of(command)
            if command in ("chat", "generate"):
                if "--server" in words:
                    words[words.index("--server") + 1] = self.server.address
                else:
                    words += ["--server", self.server.address]
            elif not demo.exists():
                words = [word if not word.startswith(".cache/") else str(self.model)
                         for word in words]
            with self.subTest(words=words), tempfile.TemporaryDirectory() as here:
                words = [word if not word.startswith(".cache/") else str(harness.SOURCE / word)
                         for word in words]
                answer = harness.run_nibble(*words, cwd=here, seconds=240)
                self.assertEqual(answer.returncode, 0, answer.stderr)

    @staticmethod
    def example_of(command):
        text = harness.run_nibble(command, "--help").stdout
        example = re.search(r"Example:\n((?:  .+\n)+)", text)[1].replace("\\\n", " ")
        return shlex.split(example)[1:]

    def test_the_examples_of_quantize_and_serve_work_as_pasted(self):
        fp16 = harness.SOURCE / ".cache" / "models" / "smollm2-135m"
        if not (fp16 / ".complete").exists():
            print(f"NOT RUN: {self.id()} (no {fp16}; make demo fetches it)")
            return
        with tempfile.TemporaryDirectory() as here:
            models = pathlib.Path(here) / ".cache" / "models"
            models.mkdir(parents=True)
            (models / fp16.name).symlink_to(fp16)
            answer = harness.run_nibble(*self.example_of("quantize"), cwd=here, seconds=240)
            self.assertEqual(answer.returncode, 0, answer.stderr)
            # As make demo leaves it, which the example of serve names.
            words = self.example_of("serve")
            (models / pathlib.Path(words[1]).name).symlink_to(self.model)
            server = harness.Server(models.parent.parent / words[1],
                                    *[word for word in words[2:] if word != "50051"][:-1])
            self.addCleanup(server.close)
            self.assertEqual(server.end(), 0)


if __name__ == "__main__":
    unittest.main()
