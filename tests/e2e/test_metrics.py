"""The metrics pages are valid, and say what the server did."""

import re
import subprocess
import unittest

import harness


class MetricsTest(harness.ServedTestCase):

    def generate(self, tokens):
        from nibble.inference.v1 import inference_pb2 as pb  # pylint: disable=C0415
        request = pb.GenerateRequest(
            text="Once upon a time", sampling=pb.SamplingParams(temperature=0),
            stopping=pb.StoppingCriteria(max_tokens=tokens, ignore_eos=True))
        return self.inference().Generate(request, timeout=harness.CALL_SECONDS)

    def test_promtool_finds_nothing_wrong(self):
        self.generate(4)
        for which in ("metrics", "worker_metrics"):
            status, page = harness.http_get(self.server.addresses[which], "/metrics")
            self.assertEqual(status, 200)
            check = subprocess.run([harness.tool("promtool"), "check", "metrics"], input=page,
                                   capture_output=True, text=True, check=False,
                                   timeout=harness.CALL_SECONDS)
            self.assertEqual(check.returncode, 0, f"{which}: {check.stdout}{check.stderr}")

    def test_token_counters_grow_by_what_was_delivered(self):
        names = (("nibble_gateway_generated_tokens_total", "metrics"),
                 ("nibble_generated_tokens_total", "worker_metrics"))
        before = [self.server.metric(*name) for name in names]
        prompts = self.server.metric("nibble_gateway_prompt_tokens_total")
        answer = self.generate(32)
        self.assertEqual(answer.usage.completion_tokens, 32)
        for name, value in zip(names, before):
            harness.wait_until(lambda n=name, v=value: self.server.metric(*n) == v + 32, 10,
                               f"{name[0]} grows by 32")
        self.assertEqual(self.server.metric("nibble_gateway_prompt_tokens_total"),
                         prompts + answer.usage.prompt_tokens)

    def test_memory_of_every_rank_is_as_planned(self):
        for rank in ("0", "1"):
            actual = self.server.metric("nibble_memory_bytes", "worker_metrics", rank=rank)
            planned = self.server.metric("nibble_memory_planned_bytes", "worker_metrics",
                                         rank=rank)
            self.assertGreater(actual, 50e6)
            self.assertAlmostEqual(actual / planned, 1, delta=0.01)
            self.assertEqual(self.server.metric("nibble_rank_up", "worker_metrics", rank=rank), 1)

    def test_latency_histograms_count_requests(self):
        before = self.server.metric("nibble_gateway_time_to_first_token_seconds_count")
        self.generate(4)
        harness.wait_until(
            lambda: self.server.metric("nibble_gateway_time_to_first_token_seconds_count")
            == before + 1, 10, "one more first token")
        for name in ("nibble_time_to_first_token_seconds_count",
                     "nibble_inter_token_latency_seconds_count",
                     "nibble_step_duration_seconds_count"):
            self.assertGreater(self.server.metric(name, "worker_metrics"), 0, name)

    def test_rejections_are_counted_by_reason(self):
        import grpc  # pylint: disable=C0415
        from nibble.inference.v1 import inference_pb2 as pb  # pylint: disable=C0415
        before = self.server.metric("nibble_gateway_requests_rejected_total")
        with self.assertRaises(grpc.RpcError):
            self.inference().Generate(pb.GenerateRequest(), timeout=10)
        harness.wait_until(
            lambda: self.server.metric("nibble_gateway_requests_rejected_total") == before + 1,
            10, "one more rejection")

    def test_other_projects_names_are_there_only_where_they_are_asked_for(self):
        for which in ("metrics", "worker_metrics"):
            self.assertEqual([name for name in self.server.metrics(which) if ":" in name], [])

    def test_idle_server_holds_nothing(self):
        self.generate(4)
        self.await_idle()

    def test_build_and_model_are_named(self):
        self.assertEqual(self.server.metric("nibble_build_info"), 1)
        self.assertEqual(self.server.metric("nibble_build_info", "worker_metrics"), 1)
        self.assertGreaterEqual(self.server.metric("nibble_model_info", "worker_metrics"), 1)


class VllmNamesTest(harness.ServedTestCase):
    """With --metrics-vllm-names; every other suite runs without."""

    flags = (*harness.ServedTestCase.flags, "--metrics-vllm-names")
    # vLLM's name and ours, and on which page.
    SAME = (("vllm:num_requests_running", "nibble_requests_running", "worker_metrics"),
            ("vllm:num_requests_waiting", "nibble_requests_waiting", "worker_metrics"),
            ("vllm:kv_cache_usage_perc", "nibble_kv_cache_usage_ratio", "worker_metrics"),
            ("vllm:prompt_tokens_total", "nibble_prompt_tokens_total", "worker_metrics"),
            ("vllm:generation_tokens_total", "nibble_generated_tokens_total", "worker_metrics"),
            ("vllm:request_success_total", "nibble_requests_total", "worker_metrics"),
            ("vllm:time_to_first_token_seconds_count", "nibble_time_to_first_token_seconds_count",
             "worker_metrics"),
            ("vllm:inter_token_latency_seconds_sum", "nibble_inter_token_latency_seconds_sum",
             "worker_metrics"),
            ("vllm:e2e_request_latency_seconds_count", "nibble_request_duration_seconds_count",
             "worker_metrics"),
            ("vllm:request_generation_tokens_sum", "nibble_gateway_request_generated_tokens_sum",
             "metrics"))

    def test_the_same_figures_stand_under_both_names(self):
        from nibble.inference.v1 import inference_pb2 as pb  # pylint: disable=C0415
        self.inference().Generate(pb.GenerateRequest(
            text="Once upon a time", stopping=pb.StoppingCriteria(max_tokens=7, ignore_eos=True)),
            timeout=harness.CALL_SECONDS)
        self.await_idle()
        for vllm, own, which in self.SAME:
            page = self.server.metrics(which)
            self.assertIn(vllm, page)
            self.assertEqual(sum(value for _, value in page[vllm]),
                             sum(value for _, value in page[own]), vllm)
            for labels, _ in page[vllm]:
                self.assertEqual(labels["model_name"], page[own][0][0]["model"], vllm)
                self.assertEqual(labels["engine"], "0", vllm)
        self.assertEqual(self.server.metric("vllm:generation_tokens_total", "worker_metrics"), 7)
        self.assertEqual(self.server.metric("vllm:request_success_total", "worker_metrics",
                                            finished_reason="length"), 1)

    def test_operations_lists_the_names(self):
        text = (harness.SOURCE / "docs" / "OPERATIONS.md").read_text(encoding="utf-8")
        table = text.split("### vLLM's names")[1].split("\n## ")[0]
        documented = set(re.findall(r"`(vllm:\w+)", table))
        exported = set()
        for which in ("metrics", "worker_metrics"):
            page = harness.http_get(self.server.addresses[which], "/metrics")[1]
            exported |= set(re.findall(r"^# TYPE (vllm:\S+)", page, re.MULTILINE))
        self.assertEqual(documented, exported)


if __name__ == "__main__":
    unittest.main()
