// How a group ends: ranks and supervisors that are killed or stopped, drains, second signals.
// Bounds are those that users are promised, times three for a loaded machine.

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/exit_codes.h"
#include "tests/integration/worker/worker_process.h"
#include "tests/support/test_data.h"

namespace nibble::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using Clock = std::chrono::steady_clock;

constexpr seconds kGroupGone{5 * 3};
constexpr seconds kStreamsEnded{2 * 3};
constexpr seconds kSecondSignal{2 * 3};
// A hung rank's streams end within two step deadlines; a second more for a loaded machine, which is
// less than any wait of the supervisor's own would add.
constexpr char kShortDeadline[] = "--step-deadline=1s";
constexpr seconds kHangEnded{2 * 1 + 1};
constexpr int kStreams = 24;

std::vector<std::string> Flags(std::vector<std::string> flags = {}) {
  flags.push_back("--model=" + SourceDir() + "/tests/data/model-specs/llama-awq-gemm");
  flags.push_back("--model-name=tiny");
  flags.push_back("--threads=1");
  flags.push_back("--tp=3");
  flags.push_back("--max-sequences=32");
  return flags;
}

// Clients that keep generating, one stream after another, until one of theirs fails.
class Load {
 public:
  explicit Load(WorkerProcess* worker) : stub_(&worker->stub()), clients_(kStreams) {
    for (Client& client : clients_) client.thread = std::thread([this, &client] { Run(&client); });
  }
  ~Load() { Join(); }

  // Every client is in the middle of a stream. False when that does not come about.
  [[nodiscard]] bool AwaitMidStream() {
    const auto until = Clock::now() + seconds(30);
    const auto streaming = [](const Client& client) { return client.tokens.load() > 0; };
    while (!std::all_of(clients_.begin(), clients_.end(), streaming)) {
      if (Clock::now() >= until) return false;
      std::this_thread::sleep_for(milliseconds(1));
    }
    return true;
  }

  void Join() {
    for (Client& client : clients_) {
      if (client.thread.joinable()) client.thread.join();
    }
  }
  void StopAfterThisStream() { stopping_ = true; }

  // How each client's last stream ended, and whether it had delivered tokens.
  [[nodiscard]] int Count(grpc::StatusCode code) const {
    return static_cast<int>(std::count_if(clients_.begin(), clients_.end(), [&](const auto& c) {
      return c.status.error_code() == code;
    }));
  }
  [[nodiscard]] int CutShort() const {
    return static_cast<int>(std::count_if(clients_.begin(), clients_.end(), [](const auto& c) {
      return !c.status.ok() && c.tokens > 0;
    }));
  }

 private:
  struct Client {
    std::thread thread;
    std::atomic<int> tokens{0};  // of the current stream
    grpc::Status status;
  };

  void Run(Client* client) {
    do {
      client->tokens = 0;
      grpc::ClientContext context;
      const auto stream = stub_->Generate(&context, GreedyRequest({1, 2, 3}, 250));
      worker::v1::GenerateResponse response;
      while (stream->Read(&response)) client->tokens += response.tokens().ids_size();
      client->status = stream->Finish();
    } while (client->status.ok() && !stopping_);
  }

  worker::v1::WorkerService::Stub* stub_;
  std::vector<Client> clients_;
  std::atomic<bool> stopping_{false};
};

// Runs a group under load, does `fault` to it and checks that streams and processes end in time.
template <typename Fault>
void EndUnderLoad(WorkerProcess* worker, int exit_code, seconds streams_limit, const Fault& fault) {
  ASSERT_TRUE(worker->AwaitServing());
  ASSERT_EQ(worker->ranks().size(), 3u);
  Load load(worker);
  ASSERT_TRUE(load.AwaitMidStream());
  const auto begin = Clock::now();
  fault();
  load.Join();
  const auto streams_ended = Clock::now() - begin;
  EXPECT_LT(streams_ended, streams_limit);
  EXPECT_EQ(load.Count(grpc::StatusCode::UNAVAILABLE), kStreams);
  EXPECT_GE(load.CutShort(), 20);  // else the fault did not meet streams
  EXPECT_EQ(worker->AwaitExit(kGroupGone), exit_code);
  EXPECT_TRUE(worker->AwaitNobodyLeft(kGroupGone));
  EXPECT_LT(Clock::now() - begin, kGroupGone);
  std::printf("streams ended after %.0f ms, everything after %.0f ms\n",
              std::chrono::duration<double, std::milli>(streams_ended).count(),
              std::chrono::duration<double, std::milli>(Clock::now() - begin).count());
}

TEST(GroupEnd, AKilledFollowerEndsTheGroup) {
  const std::string last_words = ::testing::TempDir() + "/nibble-last-words";
  WorkerProcess worker(Flags({"--termination-log=" + last_words}));
  EndUnderLoad(&worker, kExitRankLost, kStreamsEnded, [&] { ::kill(worker.ranks()[1], SIGKILL); });
  std::string line;
  std::getline(std::ifstream(last_words), line);
  EXPECT_THAT(line, ::testing::StartsWith("exit code 5: rank 1 was killed by signal 9"));
  ::unlink(last_words.c_str());
  EXPECT_THAT(worker.Errors(), ::testing::HasSubstr("rank 1 was killed by signal 9"));
}

TEST(GroupEnd, AKilledLeaderEndsTheGroup) {
  WorkerProcess worker(Flags());
  EndUnderLoad(&worker, kExitRankLost, kStreamsEnded, [&] { ::kill(worker.ranks()[0], SIGKILL); });
  EXPECT_THAT(worker.Errors(), ::testing::HasSubstr("rank 0 was killed by signal 9"));
}

TEST(GroupEnd, AKilledSupervisorLeavesNobodyBehind) {
  WorkerProcess worker(Flags());
  EndUnderLoad(&worker, 128 + SIGKILL, kStreamsEnded, [&] { worker.Signal(SIGKILL); });
}

TEST(GroupEnd, AFollowerThatAbortsEndsTheGroup) {
  WorkerProcess worker(Flags());
  EndUnderLoad(&worker, kExitRankLost, kStreamsEnded, [&] { ::kill(worker.ranks()[2], SIGABRT); });
}

TEST(GroupEnd, AStoppedFollowerIsAHang) {
  WorkerProcess worker(Flags({kShortDeadline}));
  EndUnderLoad(&worker, kExitHang, kHangEnded, [&] { ::kill(worker.ranks()[1], SIGSTOP); });
  // The soft half of the deadline: every rank, the stopped one by its state.
  const std::string errors = worker.Errors();
  for (const char* what : {"rank 0: process", "rank 2: process", "engine: "}) {
    EXPECT_THAT(errors, ::testing::HasSubstr(what));
  }
  EXPECT_THAT(errors, ::testing::HasSubstr(
                          absl::StrCat("rank 1: process ", worker.ranks()[1], ", state T")));
}

TEST(GroupEnd, AStoppedLeaderIsAHang) {
  WorkerProcess worker(Flags({kShortDeadline}));
  EndUnderLoad(&worker, kExitHang, kHangEnded, [&] { ::kill(worker.ranks()[0], SIGSTOP); });
}

TEST(GroupEnd, AKilledFollowerEndsAnIdleGroupToo) {
  WorkerProcess worker(Flags());
  ASSERT_TRUE(worker.AwaitServing());
  ::kill(worker.ranks()[2], SIGKILL);
  EXPECT_EQ(worker.AwaitExit(kGroupGone), kExitRankLost);
  EXPECT_TRUE(worker.AwaitNobodyLeft(kGroupGone));
}

TEST(GroupEnd, ATerminatedGroupDrains) {
  WorkerProcess worker(Flags());
  ASSERT_TRUE(worker.AwaitServing());
  Load load(&worker);
  ASSERT_TRUE(load.AwaitMidStream());
  load.StopAfterThisStream();
  // As it comes to a whole process group: the ranks leave it to their supervisor.
  for (const pid_t rank : worker.ranks()) ::kill(rank, SIGTERM);
  worker.Signal(SIGTERM);
  int status = 0;
  const auto until = Clock::now() + seconds(3);
  do {
    (void)worker.Get("/readyz", &status);
  } while (status == 200 && Clock::now() < until);
  EXPECT_EQ(status, 503);
  load.Join();
  // Streams that ran have finished; those that came in the meantime were refused.
  EXPECT_EQ(load.Count(grpc::StatusCode::OK) + load.Count(grpc::StatusCode::UNAVAILABLE), kStreams);
  EXPECT_EQ(load.CutShort(), 0);
  EXPECT_EQ(worker.AwaitExit(kGroupGone), kExitDrained);
  EXPECT_TRUE(worker.AwaitNobodyLeft(kGroupGone));
}

TEST(GroupEnd, WhatIsLateInADrainEndsUnavailable) {
  WorkerProcess worker(Flags({"--drain-timeout=0s"}));
  EndUnderLoad(&worker, kExitDrained, kStreamsEnded, [&] { worker.Signal(SIGTERM); });
}

TEST(GroupEnd, ASecondSignalEndsADrainAtOnce) {
  WorkerProcess worker(Flags());
  ASSERT_TRUE(worker.AwaitServing());
  // A stream that nobody reads keeps the drain waiting.
  grpc::ClientContext context;
  const auto stream = worker.stub().Generate(&context, GreedyRequest({1, 2, 3}, 250));
  worker::v1::GenerateResponse response;
  ASSERT_TRUE(stream->Read(&response));
  Load load(&worker);
  ASSERT_TRUE(load.AwaitMidStream());
  worker.Signal(SIGTERM);
  int status = 200;
  const auto draining_by = Clock::now() + kSecondSignal;
  while (status == 200 && Clock::now() < draining_by) (void)worker.Get("/readyz", &status);
  ASSERT_NE(status, 200);
  worker.Signal(SIGTERM);
  EXPECT_EQ(worker.AwaitExit(kSecondSignal), kExitFailure);
  EXPECT_TRUE(worker.AwaitNobodyLeft(kSecondSignal));
}

// Until the process has started ranks.
bool AwaitChildren(pid_t pid) {
  const std::string path = absl::StrCat("/proc/", pid, "/task/", pid, "/children");
  const auto until = Clock::now() + seconds(30);
  for (pid_t child = 0; Clock::now() < until; std::this_thread::sleep_for(milliseconds(1))) {
    if (std::ifstream(path) >> child) return true;
  }
  return false;
}

TEST(GroupEnd, ASignalWhileLoadingEndsItAtOnce) {
  const auto folder =
      TestData("models/smollm2-135m-awq-gemm-g64", "ASignalWhileLoadingEndsItAtOnce");
  if (!folder.has_value()) return;
  WorkerProcess worker({"--model=" + *folder, "--tp=2"});
  ASSERT_TRUE(AwaitChildren(worker.pid()));
  worker.Signal(SIGTERM);
  EXPECT_EQ(worker.AwaitExit(kSecondSignal), kExitDrained);
  EXPECT_THAT(worker.Errors(), ::testing::HasSubstr("stopped while loading"));
}

}  // namespace
}  // namespace nibble::testing
