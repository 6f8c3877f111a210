// What the engine does when something below it breaks.
#include "engine_bench.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "worker/engine/engine.h"
#include "worker/step/plan_codec.h"

namespace nibble::engine {
namespace {

using ::testing::HasSubstr;

// Keeps what was published, and fails when told to.
class RecordingPublisher final : public step::PlanPublisher {
 public:
  absl::Status Publish(const step::StepPlan& plan) override {
    if (plan.step_id == fail_at) return absl::DeadlineExceededError("reader 1 left it full");
    std::vector<std::byte> bytes(step::EncodedSize(plan));
    EXPECT_TRUE(step::Encode(plan, bytes).ok());
    plans.push_back(std::move(bytes));
    return absl::OkStatus();
  }
  absl::Status Publish(const step::MaskBatch&) override { return absl::OkStatus(); }
  absl::Status Stop() override {
    ++stops;
    return absl::OkStatus();
  }

  std::vector<std::vector<std::byte>> plans;
  uint64_t fail_at = 0;
  int stops = 0;
};

// Some running, some waiting, some not even taken in: each ends UNAVAILABLE, exactly once.
absl::Status RunIntoFault(BenchOptions options) {
  EngineBench bench(std::move(options));
  std::vector<EngineBench::Submitted> requests;
  for (uint64_t seed = 1; seed <= 7; ++seed) {
    requests.push_back(bench.Submit(MakeRequest(seed, 20, 50)));
  }
  absl::Status status;
  for (int turn = 0; turn < 100 && status.ok(); ++turn) {
    status = bench.engine().RunStep().status();
  }
  for (const auto& request : requests) {
    EXPECT_TRUE(request.sink->ended());
    EXPECT_EQ(request.sink->code(), absl::StatusCode::kUnavailable);
  }
  EXPECT_EQ(bench.stats().requests_failed.Get(), 7u);
  EXPECT_EQ(bench.engine().GetLoad().running, 0);
  EXPECT_EQ(bench.engine().GetLoad().waiting, 0);
  EXPECT_EQ(bench.TrySubmit(MakeRequest(9, 4, 4)).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(bench.engine().RunStep().status(), status);  // it stays ended
  EXPECT_EQ(bench.engine().Run(), status);
  return status;
}

TEST(EngineFaultTest, AFailedLaunchEndsTheGroup) {
  BenchOptions options;
  options.faults.launch_error_at = 5;
  EXPECT_EQ(RunIntoFault(options).code(), absl::StatusCode::kInternal);
}

TEST(EngineFaultTest, AFailedStepEndsTheGroup) {
  BenchOptions options;
  options.faults.wait_error_at = 5;
  EXPECT_EQ(RunIntoFault(options).code(), absl::StatusCode::kInternal);
}

TEST(EngineFaultTest, AStepThatHangsEndsTheGroupAtTheStepDeadline) {
  BenchOptions options;
  options.faults.hang_at = 5;
  EXPECT_EQ(RunIntoFault(options).code(), absl::StatusCode::kDeadlineExceeded);
}

TEST(EngineFaultTest, AStepSlowerThanTheStepDeadlineEndsTheGroup) {
  BenchOptions options;
  options.engine.step_deadline = std::chrono::seconds(1);
  options.step_base = std::chrono::milliseconds(1001);
  EXPECT_EQ(RunIntoFault(options).code(), absl::StatusCode::kDeadlineExceeded);
}

TEST(EngineFaultTest, AReaderThatIsLostEndsTheGroup) {
  RecordingPublisher publisher;
  publisher.fail_at = 4;
  BenchOptions options;
  options.publisher = &publisher;
  const absl::Status status = RunIntoFault(options);
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(status.message(), HasSubstr("reader 1"));
  EXPECT_EQ(publisher.plans.size(), 3u);
  EXPECT_EQ(publisher.stops, 0);
}

TEST(EngineFaultTest, PublishesEveryPlanBeforeItRunsIt) {
  RecordingPublisher publisher;
  BenchOptions options;
  options.publisher = &publisher;
  EngineBench bench(options);
  bench.Submit(MakeRequest(1, 40, 9));
  bench.RunToEnd();
  ASSERT_EQ(publisher.plans.size(), bench.engine().GetLoad().steps);
  // A follower that replays the same bytes does the same work.
  testing::FakeExecutor follower({.limits = options.limits});
  step::StepPlan plan;
  step::StepResult result;
  for (const auto& bytes : publisher.plans) {
    ASSERT_TRUE(step::Decode(bytes, &plan).ok());
    ASSERT_TRUE(follower.Launch(plan).ok());
    ASSERT_TRUE(follower.Wait(Deadline::max(), &result).ok());
  }
  EXPECT_EQ(follower.tokens_fed(), bench.executor().tokens_fed());
}

TEST(EngineFaultTest, ANonFiniteRowEndsOnlyItsRequest) {
  BenchOptions options;
  options.faults.non_finite = [](uint64_t step_id, int32_t slot) {
    return step_id == 5 && slot == 1;
  };
  EngineBench bench(options);
  std::vector<EngineBench::Submitted> requests;
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    requests.push_back(bench.Submit(MakeRequest(seed, 4, 10)));
  }
  bench.RunToEnd();
  EXPECT_EQ(requests[0].sink->code(), absl::StatusCode::kOk);
  EXPECT_EQ(requests[1].sink->code(), absl::StatusCode::kInternal);
  EXPECT_EQ(requests[1].sink->tokens().size(), 4u);
  EXPECT_EQ(requests[2].sink->code(), absl::StatusCode::kOk);
  EXPECT_EQ(bench.stats().nonfinite_rows.Get(), 1u);
}

TEST(EngineFaultTest, DestroyingTheEngineEndsWhatIsLeft) {
  EngineBench bench;
  const auto running = bench.Submit(MakeRequest(1, 4, 50));
  bench.Turns(3);
  const auto fresh = bench.Submit(MakeRequest(2, 4, 50));
  bench.DestroyEngine();
  EXPECT_EQ(running.sink->code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(fresh.sink->code(), absl::StatusCode::kUnavailable);
}

TEST(EngineFaultTest, StopWaitsForStepsInFlightAndStopsThePublisher) {
  RecordingPublisher publisher;
  BenchOptions options;
  options.publisher = &publisher;
  EngineBench bench(options);
  const auto request = bench.Submit(MakeRequest(1, 4, 50));
  bench.Turns(4);
  bench.engine().Stop();
  EXPECT_TRUE(bench.engine().Run().ok());
  EXPECT_EQ(request.sink->code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(publisher.stops, 1);
  EXPECT_EQ(bench.engine().GetLoad().steps, publisher.plans.size());
  bench.ExpectIdle();
}

}  // namespace
}  // namespace nibble::engine
