// A group whose ranks are on two machines: two network namespaces, a worker in each, joined over
// the cable between them. Bounds are those that users are promised, times three.

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/exit_codes.h"
#include "tests/integration/worker/worker_process.h"
#include "tests/support/test_data.h"
#include "tests/support/two_namespaces.h"

namespace nibble::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using ::testing::HasSubstr;
using Clock = std::chrono::steady_clock;
using Flags = std::vector<std::string>;

constexpr seconds kGone{5 * 3};
// A machine that was killed is noticed at once, a cut cable after a step deadline, here 2 s.
constexpr seconds kKilled{2 * 3};
constexpr seconds kHung{2 * 2 * 3};
constexpr int kStreams = 24;

std::string Model(const char* name) { return SourceDir() + "/tests/data/model-specs/" + name; }

// Two machines and a worker on each; false where namespaces are not permitted.
class MachinesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_NE(::mkdtemp(folder_.data()), nullptr);
    if (!machines_.made()) {
      std::fprintf(stderr, "NOT RUN: %s (network namespaces are not permitted here)\n",
                   ::testing::UnitTest::GetInstance()->current_test_info()->name());
    }
  }
  void TearDown() override {
    leader_.reset();
    other_.reset();
    std::filesystem::remove_all(folder_);
  }

  [[nodiscard]] Flags Of(int side, Flags flags) const {
    if (side == 0) flags.push_back("--listen=unix:" + folder_ + "/leader");
    flags.push_back("--metrics-listen=");
    flags.push_back("--threads=1");
    flags.push_back("--max-sequences=32");
    flags.push_back("--group-size=2");
    flags.push_back("--group-index=" + std::to_string(side));
    flags.push_back("--group-leader=" + machines_.address(0));
    return flags;
  }
  void Start(const Flags& flags) {
    // In the wrong order: the one that joins waits.
    other_ = std::make_unique<WorkerProcess>(Of(1, flags), machines_.Prefix(1));
    leader_ = std::make_unique<WorkerProcess>(Of(0, flags), machines_.Prefix(0));
  }
  [[nodiscard]] bool Serve(const Flags& flags) {
    Start(flags);
    return leader_->AwaitServing() && other_->AwaitServing();
  }

  std::string folder_ = std::filesystem::temp_directory_path() / "nibble-machines-XXXXXX";
  const TwoNamespaces machines_;
  std::unique_ptr<WorkerProcess> leader_, other_;
};

// Streams that run for as long as they are let.
class Streams {
 public:
  explicit Streams(WorkerProcess* worker) : stub_(&worker->stub()), statuses_(kStreams) {
    for (size_t i = 0; i < statuses_.size(); ++i) {
      threads_.emplace_back([this, i] { Run(i); });
    }
  }
  ~Streams() { Join(); }
  [[nodiscard]] bool AwaitMidStream() const {
    const auto until = Clock::now() + seconds(60);
    while (streaming_ < kStreams) {
      if (Clock::now() >= until) return false;
      std::this_thread::sleep_for(milliseconds(1));
    }
    return true;
  }
  void Join() {
    for (std::thread& thread : threads_) {
      if (thread.joinable()) thread.join();
    }
  }
  void StopAfterThese() { stopping_ = true; }
  [[nodiscard]] int Count(grpc::StatusCode code) const {
    int count = 0;
    for (const grpc::Status& status : statuses_) count += status.error_code() == code ? 1 : 0;
    return count;
  }

 private:
  void Run(size_t index) {
    bool first = true;
    do {
      grpc::ClientContext context;
      const auto stream = stub_->Generate(&context, GreedyRequest({1, 2, 3}, 250));
      worker::v1::GenerateResponse response;
      while (stream->Read(&response)) {
        if (response.tokens().ids_size() > 0 && std::exchange(first, false)) ++streaming_;
      }
      statuses_[index] = stream->Finish();
    } while (statuses_[index].ok() && !stopping_);
  }

  worker::v1::WorkerService::Stub* stub_;
  std::vector<grpc::Status> statuses_;
  std::vector<std::thread> threads_;
  std::atomic<int> streaming_{0};
  std::atomic<bool> stopping_{false};
};

TEST_F(MachinesTest, TheTokensAreThoseOfOneProcess) {
  if (!machines_.made()) return;
  for (const char* name : {"llama-awq-gemm", "qwen3"}) {
    for (const char* numerics : {"--numerics=exact", "--numerics=fast"}) {
      const Flags flags = {"--model=" + Model(name), numerics};
      const worker::v1::GenerateRequest request = GreedyRequest({3, 14, 15, 92}, 40);
      std::vector<int32_t> expected;
      {
        Flags alone = flags;
        alone.insert(alone.end(), {"--tp=2", "--threads=1"});
        WorkerProcess worker(alone);
        ASSERT_TRUE(worker.AwaitServing());
        expected = Generate(&worker.stub(), request).ids;
        ASSERT_EQ(expected.size(), 40u);
      }
      Flags two = flags;
      two.push_back("--tp=2");
      ASSERT_TRUE(Serve(two));
      EXPECT_EQ(leader_->ranks().size(), 1u);
      EXPECT_EQ(other_->ranks().size(), 1u);
      EXPECT_EQ(Generate(&leader_->stub(), request).ids, expected) << name << " " << numerics;
      TearDown();
      ASSERT_TRUE(std::filesystem::create_directory(folder_));
    }
  }
}

TEST_F(MachinesTest, SeveralRanksOnEachMachine) {
  if (!machines_.made()) return;
  ASSERT_TRUE(Serve({"--model=" + Model("qwen3"), "--tp=4", "--numerics=exact"}));
  EXPECT_EQ(leader_->ranks().size(), 2u);
  EXPECT_EQ(other_->ranks().size(), 2u);
  const worker::v1::GenerateRequest request = GreedyRequest({3, 14, 15, 92}, 40);
  const std::vector<int32_t> ids = Generate(&leader_->stub(), request).ids;
  WorkerProcess alone({"--model=" + Model("qwen3"), "--numerics=exact", "--threads=1"});
  ASSERT_TRUE(alone.AwaitServing());
  EXPECT_EQ(ids, Generate(&alone.stub(), request).ids);
}

TEST_F(MachinesTest, WhatDiffersIsNamedInOneLine) {
  if (!machines_.made()) return;
  const std::string model = "--model=" + Model("llama-awq-gemm");
  leader_ = std::make_unique<WorkerProcess>(Of(0, {model, "--tp=2"}), machines_.Prefix(0));
  struct Case {
    Flags flags;
    const char* says;
    int exit_code;
  };
  for (const Case& c :
       {Case{{"--model=" + Model("qwen3"), "--tp=2"}, "in its model (", kExitModel},
        Case{{model, "--tp=2", "--context=64"}, "in its configuration (", kExitModel}}) {
    WorkerProcess wrong(Of(1, c.flags), machines_.Prefix(1));
    EXPECT_EQ(wrong.AwaitExit(seconds(60)), c.exit_code);
    EXPECT_THAT(wrong.Errors(), HasSubstr("machine 1 differs from the leader's machine"));
    EXPECT_THAT(wrong.Errors(), HasSubstr(c.says));
  }
  // The leader waits for a better one.
  other_ = std::make_unique<WorkerProcess>(Of(1, {model, "--tp=2"}), machines_.Prefix(1));
  EXPECT_TRUE(leader_->AwaitServing());
}

TEST_F(MachinesTest, AMachineThatNeverComesEndsTheOther) {
  if (!machines_.made()) return;
  const Flags flags = {"--model=" + Model("llama-awq-gemm"), "--tp=2", "--join-timeout=1s"};
  WorkerProcess leader(Of(0, flags), machines_.Prefix(0));
  EXPECT_EQ(leader.AwaitExit(kGone), kExitRankLost);
  EXPECT_THAT(leader.Errors(), HasSubstr("machine 1: has not joined in time"));
  WorkerProcess other(Of(1, flags), machines_.Prefix(1));
  EXPECT_EQ(other.AwaitExit(kGone), kExitRankLost);
  EXPECT_THAT(other.Errors(), HasSubstr("was not reached in time"));
}

// Does `fault` to a group under load; streams and both machines end in time, with these codes.
template <typename Fault>
void EndUnderLoad(WorkerProcess* leader, WorkerProcess* other, int leader_code, int other_code,
                  seconds limit, const Fault& fault) {
  Streams streams(leader);
  ASSERT_TRUE(streams.AwaitMidStream());
  const auto begin = Clock::now();
  fault();
  streams.Join();
  const auto ended = Clock::now() - begin;
  EXPECT_LT(ended, limit);
  EXPECT_EQ(streams.Count(grpc::StatusCode::UNAVAILABLE), kStreams);
  EXPECT_EQ(leader->AwaitExit(kGone), leader_code);
  EXPECT_EQ(other->AwaitExit(kGone), other_code);
  EXPECT_TRUE(leader->AwaitNobodyLeft(kGone));
  EXPECT_TRUE(other->AwaitNobodyLeft(kGone));
  std::printf("streams ended after %.0f ms\n",
              std::chrono::duration<double, std::milli>(ended).count());
}

class MachinesEndTest : public MachinesTest {
 protected:
  [[nodiscard]] bool ServeTiny() {
    return machines_.made() &&
           Serve({"--model=" + Model("llama-awq-gemm"), "--tp=2", "--step-deadline=2s"});
  }
};

TEST_F(MachinesEndTest, AKilledFollowerEndsBothMachines) {
  if (!ServeTiny()) return;
  EndUnderLoad(leader_.get(), other_.get(), kExitRankLost, kExitRankLost, kKilled,
               [&] { ::kill(other_->ranks()[0], SIGKILL); });
  EXPECT_THAT(leader_->Errors(), HasSubstr("machine 1: rank 1 was killed by signal 9"));
}

TEST_F(MachinesEndTest, AKilledMachineEndsTheOther) {
  if (!ServeTiny()) return;
  EndUnderLoad(leader_.get(), other_.get(), kExitRankLost, 128 + SIGKILL, kKilled,
               [&] { other_->Signal(SIGKILL); });
}

TEST_F(MachinesEndTest, AStoppedFollowerIsAHang) {
  if (!ServeTiny()) return;
  EndUnderLoad(leader_.get(), other_.get(), kExitHang, kExitHang, kHung,
               [&] { ::kill(other_->ranks()[0], SIGSTOP); });
}

TEST_F(MachinesEndTest, ACutCableEndsBothMachines) {
  if (!ServeTiny()) return;
  EndUnderLoad(leader_.get(), other_.get(), kExitRankLost, kExitRankLost, kHung,
               [&] { ASSERT_TRUE(machines_.Cut()); });
  EXPECT_THAT(leader_->Errors(), HasSubstr("machine 1: nothing heard of it"));
  EXPECT_THAT(other_->Errors(), HasSubstr("machine 0: nothing heard of it"));
}

// As Kubernetes does it: every pod of the group is told at the same time.
TEST_F(MachinesEndTest, ATerminatedGroupDrains) {
  for (const bool first_too : {true, false}) {
    if (!ServeTiny()) return;
    Streams streams(leader_.get());
    ASSERT_TRUE(streams.AwaitMidStream());
    streams.StopAfterThese();
    if (first_too) leader_->Signal(SIGTERM);
    other_->Signal(SIGTERM);
    streams.Join();
    EXPECT_EQ(streams.Count(grpc::StatusCode::OK) + streams.Count(grpc::StatusCode::UNAVAILABLE),
              kStreams);
    EXPECT_GT(streams.Count(grpc::StatusCode::OK), 0);
    EXPECT_EQ(leader_->AwaitExit(kGone), kExitDrained);
    EXPECT_EQ(other_->AwaitExit(kGone), kExitDrained);
    TearDown();
    ASSERT_TRUE(std::filesystem::create_directory(folder_));
  }
}

}  // namespace
}  // namespace nibble::testing
