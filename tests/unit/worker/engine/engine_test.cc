#include "worker/engine/engine.h"

#include "engine_bench.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace nibble::engine {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using ::testing::HasSubstr;

Deadline At(Duration time) { return Deadline(time); }

TEST(EngineTest, StreamsARequestToItsEnd) {
  EngineBench bench;
  const auto [id, sink] = bench.Submit(MakeRequest(7, 10, 5));
  EXPECT_NE(id, 0u);
  bench.RunToEnd();
  EXPECT_TRUE(sink->admitted());
  EXPECT_EQ(sink->code(), absl::StatusCode::kOk);
  EXPECT_EQ(sink->finish().reason, FinishReason::kLength);
  EXPECT_EQ(sink->finish().completion_tokens, 5);
  EXPECT_EQ(sink->tokens().size(), 5u);
}

TEST(EngineTest, StopsAtAStopId) {
  EngineBench bench;
  Request request = MakeRequest(7, 10, 50);
  request.stop_ids = {testing::FakeToken(7, 3, 1000)};
  const auto [id, sink] = bench.Submit(request);
  bench.RunToEnd();
  EXPECT_EQ(sink->finish().reason, FinishReason::kStop);
  EXPECT_EQ(sink->tokens().size(), 4u);
  EXPECT_EQ(bench.stats().generated_tokens.Get(), 4u);  // what ran ahead is not counted
  EXPECT_EQ(bench.executor().rows_sampled(), 5u);
}

TEST(EngineTest, DeliversLogprobsWhereAskedFor) {
  EngineBench bench;
  for (const int32_t logprobs : {-1, 0, 5, 20}) {
    Request request = MakeRequest(static_cast<uint64_t>(logprobs + 9), 4, 6);
    request.logprobs = logprobs;
    bench.Submit(request);  // the sink checks every value
  }
  bench.RunToEnd();
}

TEST(EngineTest, RefusesWhatItCannotRun) {
  EngineBench bench;
  const auto refusal = [&](auto change) {
    Request request = MakeRequest(1, 4, 4);
    change(request);
    const absl::Status status = bench.TrySubmit(request);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  EXPECT_THAT(refusal([](Request& r) { r.prompt.clear(); }), HasSubstr("empty"));
  EXPECT_EQ(refusal([](Request& r) { r.prompt.assign(256, 1); }),
            "prompt has 256 tokens; limit is 255");
  EXPECT_THAT(refusal([](Request& r) { r.prompt[1] = 1000; }), HasSubstr("vocabulary"));
  EXPECT_THAT(refusal([](Request& r) { r.prompt[1] = -1; }), HasSubstr("vocabulary"));
  EXPECT_THAT(refusal([](Request& r) { r.stop_ids = {1000}; }), HasSubstr("stop ids"));
  EXPECT_THAT(refusal([](Request& r) { r.sampling.logit_bias = {{.token_id = -4}}; }),
              HasSubstr("logit_bias"));
  EXPECT_THAT(refusal([](Request& r) { r.sampling.logit_bias = {{.token_id = 1000}}; }),
              HasSubstr("logit_bias"));
  EXPECT_THAT(refusal([](Request& r) { r.max_tokens = 0; }), HasSubstr("max_tokens"));
  EXPECT_THAT(refusal([](Request& r) { r.min_tokens = -1; }), HasSubstr("min_tokens"));
  EXPECT_THAT(refusal([](Request& r) { r.logprobs = 21; }), HasSubstr("logprobs"));
  EXPECT_THAT(refusal([](Request& r) { r.stop_ids.assign(800000, 1); }), HasSubstr("limit is"));
  EXPECT_EQ(bench.stats().rejected[step::kTooLong].Get(), 1u);
  EXPECT_EQ(bench.stats().rejected[step::kInvalid].Get(), 10u);
  EXPECT_TRUE(bench.TrySubmit(MakeRequest(1, 255, 4)).ok());
  bench.RunToEnd();
}

TEST(EngineTest, RefusesAPromptThatThePoolCanNeverHold) {
  BenchOptions options;
  options.limits.kv_blocks = 4;
  EngineBench bench(options);
  EXPECT_EQ(bench.TrySubmit(MakeRequest(1, 64, 4)).message(), "prompt has 64 tokens; limit is 63");
  const auto [id, sink] = bench.Submit(MakeRequest(1, 63, 4));
  bench.RunToEnd();
  EXPECT_EQ(sink->tokens().size(), 1u);
  EXPECT_EQ(sink->finish().reason, FinishReason::kLength);
}

TEST(EngineTest, TheQueueIsBoundedInRequests) {
  BenchOptions options;
  options.engine.queue_size = 2;
  EngineBench bench(options);
  bench.Submit(MakeRequest(1, 4, 9));
  bench.Submit(MakeRequest(2, 4, 9));
  const absl::Status full = bench.TrySubmit(MakeRequest(3, 4, 9));
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(full.message(), HasSubstr("2 requests wait; limit is 2"));
  EXPECT_EQ(bench.stats().rejected[step::kQueueFull].Get(), 1u);
  bench.Turns(1);  // both are admitted and wait no longer
  EXPECT_EQ(bench.engine().GetLoad().waiting, 0);
  EXPECT_EQ(bench.engine().GetLoad().running, 2);
  bench.Submit(MakeRequest(3, 4, 9));
  bench.RunToEnd();
}

TEST(EngineTest, TheQueueIsBoundedInPromptTokens) {
  BenchOptions options;
  options.engine.queue_prompt_tokens = 100;
  EngineBench bench(options);
  bench.Submit(MakeRequest(1, 150, 2));  // a lone one may have more
  EXPECT_EQ(bench.TrySubmit(MakeRequest(2, 1, 2)).code(), absl::StatusCode::kResourceExhausted);
  bench.Turns(1);
  bench.Submit(MakeRequest(2, 60, 2));
  bench.Submit(MakeRequest(3, 40, 2));
  EXPECT_EQ(bench.engine().GetLoad().waiting_prompt_tokens, 100);
  EXPECT_EQ(bench.TrySubmit(MakeRequest(4, 1, 2)).code(), absl::StatusCode::kResourceExhausted);
  bench.RunToEnd();
}

TEST(EngineTest, ARequestThatEndsWhileItWaitsLeavesTheQueue) {
  BenchOptions options;
  options.engine.queue_size = 1;
  options.limits.max_slots = 1;
  EngineBench bench(options);
  bench.Submit(MakeRequest(1, 4, 50));
  bench.Turns(2);
  const auto waiting = bench.Submit(MakeRequest(2, 4, 50));
  EXPECT_FALSE(bench.TrySubmit(MakeRequest(3, 4, 50)).ok());
  bench.engine().Cancel(waiting.id);
  bench.Turns(1);
  EXPECT_EQ(waiting.sink->code(), absl::StatusCode::kCancelled);
  EXPECT_FALSE(waiting.sink->admitted());
  EXPECT_TRUE(bench.TrySubmit(MakeRequest(3, 4, 5)).ok());
  bench.RunToEnd();
}

TEST(EngineTest, DeadlinesEndRequestsWithTheirStatus) {
  BenchOptions options;
  options.limits.max_slots = 1;
  options.step_base = milliseconds(10);
  EngineBench bench(options);
  Request running = MakeRequest(1, 4, 200);
  running.deadline = At(milliseconds(100));
  Request impatient = MakeRequest(2, 4, 200);
  impatient.queue_deadline = At(milliseconds(50));
  Request late = MakeRequest(3, 4, 200);
  late.deadline = At(Duration(0));
  const auto first = bench.Submit(running);
  const auto second = bench.Submit(impatient);
  const auto third = bench.Submit(late);
  bench.RunToEnd();
  EXPECT_EQ(first.sink->code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(first.sink->admitted());
  EXPECT_GE(first.sink->tokens().size(), 8u);
  EXPECT_LE(first.sink->tokens().size(), 10u);
  EXPECT_EQ(second.sink->code(), absl::StatusCode::kResourceExhausted);
  EXPECT_FALSE(second.sink->admitted());
  EXPECT_EQ(third.sink->code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_FALSE(third.sink->admitted());
  EXPECT_EQ(bench.stats().requests_expired.Get(), 2u);
  EXPECT_EQ(bench.stats().rejected[step::kQueueTimeout].Get(), 1u);
}

TEST(EngineTest, DrainFinishesWhatItHasAndTakesNothingNew) {
  EngineBench bench;
  std::vector<EngineBench::Submitted> requests;
  for (uint64_t seed = 1; seed <= 8; ++seed)
    requests.push_back(bench.Submit(MakeRequest(seed, 4, 6)));
  bench.Turns(2);
  bench.engine().Drain();
  EXPECT_TRUE(bench.engine().GetLoad().draining);
  const absl::Status refused = bench.TrySubmit(MakeRequest(9, 4, 6));
  EXPECT_EQ(refused.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(bench.stats().rejected[step::kDrainingReject].Get(), 1u);
  bench.RunToEnd();
  for (const auto& request : requests) EXPECT_EQ(request.sink->tokens().size(), 6u);
}

TEST(EngineTest, MeasuresWhatRequestsWentThrough) {
  BenchOptions options;
  options.limits.max_slots = 1;
  options.step_base = milliseconds(10);
  EngineBench bench(options);
  const auto first = bench.Submit(MakeRequest(1, 4, 3));
  const auto second = bench.Submit(MakeRequest(2, 4, 3));
  bench.RunToEnd();
  EXPECT_EQ(first.sink->finish().queue, Duration(0));
  EXPECT_EQ(first.sink->finish().prefill, milliseconds(10));
  EXPECT_EQ(first.sink->finish().decode, milliseconds(20));
  EXPECT_EQ(second.sink->finish().queue, milliseconds(30));
  EXPECT_EQ(second.sink->finish().prefill, milliseconds(10));
  step::EngineStats& stats = bench.stats();
  EXPECT_EQ(stats.prompt_tokens.Get(), 8u);
  EXPECT_EQ(stats.generated_tokens.Get(), 6u);
  EXPECT_EQ(stats.requests_finished_length.Get(), 2u);
  EXPECT_EQ(stats.steps[step::kPrefillStep].Get(), 2u);
  EXPECT_EQ(stats.steps[step::kDecodeStep].Get(), 4u);
  EXPECT_EQ(stats.time_to_first_token.count, 2u);
  EXPECT_NEAR(stats.time_to_first_token.sum, 0.01 + 0.04, 1e-9);
  EXPECT_EQ(stats.inter_token.count, 4u);
  EXPECT_NEAR(stats.inter_token.sum, 0.04, 1e-9);
  EXPECT_NEAR(stats.step_seconds[step::kDecodeStep].sum, 0.04, 1e-9);
  EXPECT_EQ(stats.step_tokens.count, 6u);
  EXPECT_EQ(stats.request_seconds.count, 2u);
  EXPECT_EQ(bench.engine().GetLoad().steps, 6u);
  EXPECT_EQ(stats.last_step_ns.Get(), bench.clock().Now().time_since_epoch().count());
}

TEST(EngineTest, TheStampOfTheLastStepIsFreshWhenWorkBeginsAfterAPause) {
  BenchOptions options;
  options.step_base = milliseconds(10);
  EngineBench bench(options);
  bench.clock().Advance(seconds(100));
  bench.Submit(MakeRequest(1, 4, 3));
  bench.Turns(1);  // launched, not yet waited for
  EXPECT_EQ(bench.stats().last_step_ns.Get(), Duration(seconds(100)).count());
  bench.RunToEnd();
}

TEST(EngineTest, ChunksFollowTheMeasuredRate) {
  BenchOptions options;
  options.limits.max_context = 4096;
  options.limits.max_step_tokens = 2048;
  options.limits.kv_blocks = 256;
  options.engine.prefill_chunk_tokens = 1024;
  options.step_per_token = milliseconds(5);  // 200 in a second
  EngineBench bench(options);
  bench.Submit(MakeRequest(1, 4000, 2));
  bench.Turns(3);  // two steps are launched before the first one is measured
  Deadline before = bench.clock().Now();
  Duration longest{};
  for (bool worked = true; worked;) {
    worked = bench.engine().RunStep().value();
    longest = std::max(longest, bench.clock().Now() - before);
    before = bench.clock().Now();
  }
  EXPECT_LE(longest, seconds(1));
  EXPECT_GE(longest, milliseconds(990));
  EXPECT_LE(bench.engine().GetLoad().steps, 20u);  // and no smaller than need be
}

TEST(EngineTest, SinksMaySubmitAndCancelFromTheirCallbacks) {
  EngineBench bench;
  const auto doomed = bench.Submit(MakeRequest(1, 4, 50));
  const Request next_request = MakeRequest(3, 4, 5);
  auto next_sink = bench.MakeSink(next_request);
  const Request request = MakeRequest(2, 4, 6);
  auto sink = bench.MakeSink(request);
  sink->on_tokens = [&](size_t tokens) {
    if (tokens == 3) bench.engine().Cancel(doomed.id);
  };
  sink->on_finished = [&] { EXPECT_TRUE(bench.engine().Submit(next_request, next_sink).ok()); };
  ASSERT_TRUE(bench.engine().Submit(request, sink).ok());
  bench.RunToEnd();
  EXPECT_EQ(doomed.sink->code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(next_sink->code(), absl::StatusCode::kOk);
}

TEST(EngineTest, LetsGoOfTheSinkWhenItHasFinished) {
  EngineBench bench;
  const Request request = MakeRequest(1, 4, 2);
  auto sink = std::make_shared<CheckingSink>(request, 1000, 2);
  const std::weak_ptr<CheckingSink> watch = sink;
  ASSERT_TRUE(bench.engine().Submit(request, std::move(sink)).ok());
  bench.Turns(1);
  EXPECT_FALSE(watch.expired());
  bench.RunToEnd();
  EXPECT_TRUE(watch.expired());
}

TEST(EngineTest, PreemptionIsInvisibleExceptInTheCount) {
  BenchOptions options;
  options.limits.kv_blocks = 6;
  options.engine.kv_watermark = 1.0;
  EngineBench bench(options);
  std::vector<EngineBench::Submitted> requests;
  for (uint64_t seed = 1; seed <= 4; ++seed)
    requests.push_back(bench.Submit(MakeRequest(seed, 10, 60)));
  bench.RunToEnd();
  int32_t preemptions = 0;
  for (const auto& request : requests) {
    EXPECT_EQ(request.sink->tokens().size(), 60u);
    preemptions += request.sink->finish().preemptions;
  }
  EXPECT_GT(preemptions, 0);
  EXPECT_EQ(bench.stats().preemptions.Get(), static_cast<uint64_t>(preemptions));
}

TEST(EngineTest, CachedPrefixesAreCountedAndToldOf) {
  BenchOptions options;
  options.engine.prefix_cache = true;
  EngineBench bench(options);
  const auto first = bench.Submit(MakeRequest(1, 100, 5));
  bench.RunToEnd();
  Request bypass = MakeRequest(2, 100, 5);
  bypass.bypass_prefix_cache = true;
  const auto second = bench.Submit(bypass);
  bench.RunToEnd();
  const auto third = bench.Submit(MakeRequest(3, 100, 5));
  bench.RunToEnd();
  Request salted = MakeRequest(4, 100, 5);
  salted.prefix_salt = "another's";
  const auto fourth = bench.Submit(salted);
  bench.RunToEnd();
  EXPECT_EQ(first.sink->cached_tokens(), 0);
  EXPECT_EQ(second.sink->cached_tokens(), 0);
  EXPECT_EQ(third.sink->cached_tokens(), 96);
  EXPECT_EQ(fourth.sink->cached_tokens(), 0);
  EXPECT_EQ(bench.stats().prefix_queried_tokens.Get(), 300u);
  EXPECT_EQ(bench.stats().prefix_hit_tokens.Get(), 96u);
  EXPECT_EQ(bench.stats().prompt_tokens.Get(), 304u);
  EXPECT_EQ(bench.stats().cached_prompt_tokens.Get(), 96u);
  EXPECT_EQ(bench.stats().kv_blocks_cached.Get(), 12);
}

}  // namespace
}  // namespace nibble::engine
