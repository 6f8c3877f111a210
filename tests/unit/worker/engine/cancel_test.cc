// Cancelling, at every moment there is.
#include "engine_bench.h"
#include "gtest/gtest.h"
#include "worker/engine/engine.h"
#include "worker/engine/inbox.h"

namespace nibble::engine {
namespace {

// A prompt of three chunks and some tokens, so that the turns pass through waiting, each chunk,
// the first token, decoding, the last token and after.
constexpr int32_t kPhases = 16;

BenchOptions ChunkedOptions() {
  BenchOptions options;
  options.engine.prefill_chunk_tokens = 16;
  return options;
}

TEST(EngineCancelTest, EndsOnceInEveryPhaseAndFreesWithinTwoSteps) {
  for (int phase = 0; phase < kPhases; ++phase) {
    EngineBench bench(ChunkedOptions());
    const auto other = bench.Submit(MakeRequest(1, 4, 60));
    const auto target = bench.Submit(MakeRequest(2, 48, 8));
    bench.Turns(phase);
    const bool ended_before = target.sink->ended();
    const auto others_blocks = [&] { return (4 + 60 + 15) / 16; };
    bench.engine().Cancel(target.id);
    bench.engine().Cancel(target.id);
    bench.Turns(1);
    ASSERT_TRUE(target.sink->ended()) << "phase " << phase;
    EXPECT_EQ(target.sink->code(),
              ended_before ? absl::StatusCode::kOk : absl::StatusCode::kCancelled);
    bench.Turns(1);
    EXPECT_EQ(bench.stats().kv_blocks_quarantined.Get(), 0) << "phase " << phase;
    EXPECT_LE(bench.stats().kv_blocks_used.Get(), others_blocks()) << "phase " << phase;
    bench.engine().Cancel(target.id);
    bench.RunToEnd();
    EXPECT_EQ(other.sink->tokens().size(), 60u);
    EXPECT_EQ(bench.stats().requests_cancelled.Get(), ended_before ? 0u : 1u);
  }
}

TEST(EngineCancelTest, EndsOnceFromEveryCallback) {
  for (const int callback : {0, 1, 2, 3}) {
    EngineBench bench(ChunkedOptions());
    const Request request = MakeRequest(2, 20, 8);
    auto sink = bench.MakeSink(request);
    RequestId id = 0;
    const auto cancel = [&] { bench.engine().Cancel(id); };
    if (callback == 0) sink->on_admitted = cancel;
    if (callback == 1) sink->on_tokens = [&](size_t) { cancel(); };
    if (callback == 2)
      sink->on_tokens = [&](size_t tokens) {
        if (tokens == 8) cancel();
      };
    if (callback == 3) sink->on_finished = cancel;
    id = bench.engine().Submit(request, sink).value();
    bench.RunToEnd();
    EXPECT_EQ(sink->code(), callback < 2 ? absl::StatusCode::kCancelled : absl::StatusCode::kOk);
  }
}

TEST(EngineCancelTest, AnIdOfThePastNeverNamesALaterRequest) {
  EngineBench bench;
  std::vector<RequestId> past;
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    const auto request = bench.Submit(MakeRequest(seed, 4, 3));
    for (const RequestId id : past) {
      EXPECT_NE(id, request.id);
      bench.engine().Cancel(id);
    }
    bench.RunToEnd();
    EXPECT_EQ(request.sink->code(), absl::StatusCode::kOk);
    past.push_back(request.id);
  }
}

TEST(EngineCancelTest, AnIdOfThePastTakesNoCancelFromALaterRequest) {
  EngineBench bench;
  const auto past = bench.Submit(MakeRequest(1, 4, 3));
  bench.RunToEnd();
  const auto request = bench.Submit(MakeRequest(2, 4, 30));  // in the same place
  bench.Turns(2);
  bench.engine().Cancel(past.id);
  bench.engine().Cancel(request.id);
  bench.RunToEnd();
  EXPECT_EQ(past.sink->code(), absl::StatusCode::kOk);
  EXPECT_EQ(request.sink->code(), absl::StatusCode::kCancelled);
}

TEST(EngineCancelTest, UnknownIdsAreNoError) {
  EngineBench bench;
  const auto request = bench.Submit(MakeRequest(1, 4, 3));
  for (const RequestId id : {RequestId{0}, RequestId{1}, ~RequestId{0}, request.id + 1}) {
    bench.engine().Cancel(id);
  }
  bench.RunToEnd();
  EXPECT_EQ(request.sink->code(), absl::StatusCode::kOk);
}

TEST(EngineCancelTest, ACancelInTheSameTurnAsItsSubmitWins) {
  EngineBench bench;
  const auto request = bench.Submit(MakeRequest(1, 4, 3));
  bench.engine().Cancel(request.id);
  bench.Turns(1);
  EXPECT_EQ(request.sink->code(), absl::StatusCode::kCancelled);
  EXPECT_FALSE(request.sink->admitted());
  bench.RunToEnd();
  EXPECT_EQ(bench.executor().tokens_fed(), 0u);
}

// Cancels that nobody has taken yet are bounded by the requests, however often somebody asks.
TEST(InboxTest, ARequestIsCancelledOnce) {
  step::EngineStats stats;
  Inbox inbox({.queue_size = 2, .queue_prompt_tokens = 100}, &stats);
  const auto id = inbox.Submit(MakeRequest(1, 4, 3), nullptr, Deadline());
  ASSERT_TRUE(id.ok());
  for (int i = 0; i < 3; ++i) inbox.Cancel(*id);
  std::vector<Submission> submissions;
  std::vector<RequestId> cancels;
  inbox.Take(&submissions, &cancels);
  EXPECT_EQ(cancels, std::vector<RequestId>{*id});
}

// A tenant that floods the queue leaves room for one that has nothing waiting.
TEST(InboxTest, OneTenantCannotFillTheQueue) {
  step::EngineStats stats;
  Inbox inbox({.queue_size = 10, .queue_prompt_tokens = 1000}, &stats);
  const auto submit = [&](const char* tenant, int32_t prompt = 4) {
    Request request = MakeRequest(1, prompt, 3);
    request.tenant = tenant;
    return inbox.Submit(std::move(request), nullptr, Deadline());
  };
  std::vector<RequestId> flood;
  for (int i = 0; i < 20; ++i) {
    const auto id = submit("flood");
    if (id.ok()) flood.push_back(*id);
    if (!id.ok()) {
      EXPECT_EQ(id.status().code(), absl::StatusCode::kResourceExhausted);
    }
  }
  EXPECT_EQ(flood.size(), 8u);
  EXPECT_TRUE(submit("other").ok());
  EXPECT_FALSE(submit("flood").ok());
  // What leaves the queue makes room again, exactly.
  inbox.LeaveQueue(flood);
  EXPECT_EQ(stats.requests_waiting.Get(), 1);
  EXPECT_EQ(stats.waiting_prompt_tokens.Get(), 4);
  for (int i = 0; i < 8; ++i) EXPECT_TRUE(submit("flood").ok()) << i;
  EXPECT_FALSE(submit("flood").ok());
}

TEST(InboxTest, PromptTokensAreSharedTheSameWay) {
  step::EngineStats stats;
  Inbox inbox({.queue_size = 1000, .queue_prompt_tokens = 1000}, &stats);
  std::vector<RequestId> ids;
  const auto submit = [&](const char* tenant, int32_t prompt) {
    Request request = MakeRequest(1, prompt, 3);
    request.tenant = tenant;
    const auto id = inbox.Submit(std::move(request), nullptr, Deadline());
    if (id.ok()) ids.push_back(*id);
    return id.ok();
  };
  while (submit("flood", 100)) continue;
  EXPECT_EQ(ids.size(), 8u);
  // What leaves makes room for as much.
  for (size_t i = 0; i < 20; ++i) {
    inbox.LeaveQueue({ids[i]});
    EXPECT_TRUE(submit("flood", 100)) << i;
    EXPECT_FALSE(submit("flood", 100)) << i;
  }
  EXPECT_TRUE(submit("other", 150));
  EXPECT_FALSE(submit("", 100));  // over the bound of all together
}

// Requests of nobody in particular may fill it.
TEST(InboxTest, WithoutTenantsTheQueueIsFilledWhole) {
  step::EngineStats stats;
  Inbox inbox({.queue_size = 10, .queue_prompt_tokens = 1000}, &stats);
  for (int i = 0; i < 10; ++i) {
    EXPECT_TRUE(inbox.Submit(MakeRequest(1, 4, 3), nullptr, Deadline()).ok());
  }
  EXPECT_FALSE(inbox.Submit(MakeRequest(1, 4, 3), nullptr, Deadline()).ok());
}

}  // namespace
}  // namespace nibble::engine
