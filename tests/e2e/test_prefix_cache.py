"""Prompts that begin alike are computed once for each tenant, and for no other.

Each test has a prompt of its own.
"""

import unittest

import harness
import secured

SUBJECT = ("The harbour town of Brevik stands on a spit of rock between two fjords. "
           "Its first houses were built of ballast stone by sailors who wintered there. ")
PROMPT = SUBJECT * 8 + "In one word, the town's name is"


class PrefixCacheTest(harness.ServedTestCase):
    start = secured.SecuredServer
    flags = ("--tp", "1", "--context", "2048")

    def ask(self, key, text=PROMPT, tokens=12, **fields):
        from nibble.inference.v1 import inference_pb2 as pb  # pylint: disable=C0415
        from nibble.inference.v1 import inference_pb2_grpc as rpc  # pylint: disable=C0415
        request = pb.GenerateRequest(
            text=text, sampling=pb.SamplingParams(temperature=0), output=pb.OutputOptions(
                token_ids=True, logprobs=0),
            stopping=pb.StoppingCriteria(max_tokens=tokens, ignore_eos=True), **fields)
        with self.server.channel() as channel:
            return rpc.InferenceServiceStub(channel).Generate(
                request, timeout=harness.CALL_SECONDS, metadata=self.server.bearer(key))

    def worker_metric(self, name, **labels):
        return self.server.metric(name, "worker_metrics", **labels)

    def test_no_tenant_sees_anothers_prefix_cache(self):
        alice, bob = self.server.key, self.server.high_key
        hits = self.worker_metric("nibble_prefix_cache_hit_tokens_total")
        queried = self.worker_metric("nibble_prefix_cache_queried_tokens_total")
        first = self.ask(alice)
        prompt = first.usage.prompt_tokens
        self.assertGreater(prompt, 200)
        self.assertEqual(first.usage.cached_prompt_tokens, 0)
        whole_blocks = (prompt - 1) // 16 * 16
        again = self.ask(alice)
        self.assertEqual(again.usage.cached_prompt_tokens, whole_blocks)
        other = self.ask(bob)
        self.assertEqual(other.usage.cached_prompt_tokens, 0)
        other_again = self.ask(bob)
        self.assertEqual(other_again.usage.cached_prompt_tokens, whole_blocks)
        bypassing = self.ask(alice, bypass_prefix_cache=True)
        self.assertEqual(bypassing.usage.cached_prompt_tokens, 0)
        # Cached or not, every answer is the same, to the last bit of its log-probabilities.
        for answer in (again, other, other_again, bypassing):
            self.assertEqual(answer.choices, first.choices)
        self.assertEqual(self.worker_metric("nibble_prefix_cache_hit_tokens_total") - hits,
                         2 * whole_blocks)
        self.assertEqual(self.worker_metric("nibble_prefix_cache_queried_tokens_total") - queried,
                         4 * prompt)

    def test_an_answer_is_a_prefix_of_the_next_turn(self):
        opening = "A letter home. " + SUBJECT * 2 + "People say that"
        first = self.ask(self.server.key, opening, tokens=40)
        followed = opening + first.choices[0].text + " And so"
        second = self.ask(self.server.key, followed)
        self.assertGreater(second.usage.cached_prompt_tokens, first.usage.prompt_tokens)

    def test_idle_is_idle_with_a_full_cache(self):
        self.ask(self.server.key, "An idle server. " + PROMPT)
        for state in ("used", "quarantined"):
            harness.wait_until(lambda s=state: self.worker_metric(
                "nibble_kv_cache_blocks", state=s) == 0, 10, f"no block is {state}")
        cached = self.worker_metric("nibble_kv_cache_blocks", state="cached")
        free = self.worker_metric("nibble_kv_cache_blocks", state="free")
        self.assertGreater(cached, 0)
        self.assertEqual(cached + free, self.worker_metric("nibble_kv_cache_blocks_capacity"))


class WithoutPrefixCacheTest(harness.ServedTestCase):
    flags = ("--tp", "1", "--context", "2048", "--prefix-cache", "off")

    def test_off_is_off(self):
        from nibble.inference.v1 import inference_pb2 as pb  # pylint: disable=C0415
        for _ in range(2):
            answer = self.inference().Generate(pb.GenerateRequest(
                text=PROMPT, stopping=pb.StoppingCriteria(max_tokens=2)),
                timeout=harness.CALL_SECONDS)
            self.assertEqual(answer.usage.cached_prompt_tokens, 0)
        self.assertEqual(self.server.metric("nibble_kv_cache_blocks", "worker_metrics",
                                            state="cached"), 0)


if __name__ == "__main__":
    unittest.main()
