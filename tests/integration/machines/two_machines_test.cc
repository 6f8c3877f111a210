// Whole steps of a real model by two ranks that only a network joins: each in a process and a
// network namespace of its own, Gloo between them.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/status.h"
#include "nlohmann/json.hpp"
#include "tests/support/test_data.h"
#include "tests/support/two_namespaces.h"
#include "worker/collectives/gloo_communicator.h"
#include "worker/collectives/self_communicator.h"
#include "worker/collectives/store.h"
#include "worker/execution/cpu/cpu_executor.h"

namespace nibble {
namespace {

using collectives::Communicator;

constexpr uint64_t kGroupKey = 77;
constexpr uint16_t kStorePort = 40124;  // the namespace is ours alone
constexpr int32_t kRanks = 2;

struct Task {
  std::string model;
  weights::Numerics numerics = weights::Numerics::kFast;
  std::vector<int32_t> prompt;
  int32_t outputs = 0;
};

// One step of one sequence on slot 0; every rank makes the same plans by itself.
step::StepPlan PlanOf(const Task& task, int32_t index) {
  const auto prompt = static_cast<int32_t>(task.prompt.size());
  step::StepPlan plan;
  plan.step_id = static_cast<uint64_t>(index) + 1;
  step::SequenceStep row = {.first_position = index == 0 ? 0 : prompt + index - 1,
                            .token_count = index == 0 ? prompt : 1,
                            .feed_sampled = index > 0,
                            .sample_count = 1};
  if (index == 0) {
    step::SlotSetup setup;
    setup.sampling.temperature = 0;
    setup.history = task.prompt;
    setup.prompt_count = prompt;
    plan.opened.push_back(std::move(setup));
    plan.token_ids = task.prompt;
    row.block_count = (prompt + task.outputs) / step::kBlockTokens + 1;
    for (int32_t block = 0; block < row.block_count; ++block) plan.block_ids.push_back(block);
  } else {
    plan.token_ids = {-1};
  }
  plan.sequences.push_back(row);
  return plan;
}

absl::StatusOr<std::vector<int32_t>> Generate(const Task& task, Communicator* communicator) {
  ASSIGN_OR_RETURN(const auto checkpoint, weights::Checkpoint::Open(task.model));
  execution::CpuExecutorOptions options;
  options.memory.numerics = task.numerics;
  options.memory.max_context = 256;
  options.memory.max_slots = 1;
  options.memory.threads = 1;
  ASSIGN_OR_RETURN(const auto plan,
                   weights::PlanMemory(*checkpoint, communicator->size(), options.memory));
  ASSIGN_OR_RETURN(const auto executor, execution::CpuExecutor::Create(
                                            *checkpoint, plan, communicator, std::move(options)));
  std::vector<int32_t> ids;
  step::StepResult result;
  for (int32_t index = 0; index < task.outputs; ++index) {
    RETURN_IF_ERROR(executor->Launch(PlanOf(task, index)));
    RETURN_IF_ERROR(
        executor->Wait(std::chrono::steady_clock::now() + std::chrono::minutes(1), &result));
    ids.push_back(result.tokens.at(0).token_id);
  }
  return ids;
}

// A child process that writes its token ids to a pipe.
class RankProcess {
 public:
  explicit RankProcess(
      const std::function<absl::StatusOr<std::unique_ptr<Communicator>>()>& connect,
      const Task& task) {
    int ends[2] = {-1, -1};
    EXPECT_EQ(pipe(ends), 0);
    pid_ = fork();
    if (pid_ == 0) {
      close(ends[0]);
      _exit(Run(connect, task, ends[1]));
    }
    close(ends[1]);
    read_end_ = ends[0];
  }
  // Its tokens, once it has ended; empty where it failed.
  [[nodiscard]] std::vector<int32_t> Join() const {
    std::vector<int32_t> ids;
    int32_t id = 0;
    while (read(read_end_, &id, sizeof(id)) == sizeof(id)) ids.push_back(id);
    close(read_end_);
    int status = 0;
    EXPECT_EQ(waitpid(pid_, &status, 0), pid_);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
    return ids;
  }

 private:
  static int Run(const std::function<absl::StatusOr<std::unique_ptr<Communicator>>()>& connect,
                 const Task& task, int write_end) {
    const auto communicator = connect();
    const auto ids = communicator.ok()
                         ? Generate(task, communicator->get())
                         : absl::StatusOr<std::vector<int32_t>>(communicator.status());
    if (!ids.ok()) {
      std::fprintf(stderr, "%s\n", ids.status().ToString().c_str());
      return 1;
    }
    const auto bytes = static_cast<ssize_t>(ids->size() * sizeof(int32_t));
    return write(write_end, ids->data(), static_cast<size_t>(bytes)) == bytes ? 0 : 2;
  }

  pid_t pid_ = -1;
  int read_end_ = -1;
};

std::vector<int32_t> Alone(const Task& task) {
  return RankProcess(
             []() -> absl::StatusOr<std::unique_ptr<Communicator>> {
               return collectives::MakeSelfCommunicator();
             },
             task)
      .Join();
}

// What both ranks gave, which must be the same.
std::vector<int32_t> OverTwoMachines(const testing::TwoNamespaces& machines, const Task& task) {
  const auto connect = [&machines](int32_t rank) {
    return [&machines, rank]() -> absl::StatusOr<std::unique_ptr<Communicator>> {
      if (!machines.Enter(rank)) return absl::InternalError("no namespace");
      std::unique_ptr<collectives::StoreServer> server;
      if (rank == 0) {
        ASSIGN_OR_RETURN(server, collectives::StoreServer::Listen({.address = machines.address(0),
                                                                   .port = kStorePort,
                                                                   .group_key = kGroupKey}));
      }
      return collectives::MakeGlooCommunicator({.rank = rank,
                                                .size = kRanks,
                                                .bind_address = machines.address(rank),
                                                .store_host = machines.address(0),
                                                .store_port = kStorePort,
                                                .group_key = kGroupKey});
    };
  };
  const RankProcess leader(connect(0), task);
  const RankProcess follower(connect(1), task);
  std::vector<int32_t> ids = leader.Join();
  EXPECT_EQ(follower.Join(), ids);
  return ids;
}

TEST(TwoMachines, AGroupOverTheNetworkGivesTheTokensOfOneRank) {
  const testing::TwoNamespaces machines;
  if (!machines.made()) {
    std::fprintf(stderr, "NOT RUN: TwoMachines over two network namespaces (not permitted here)\n");
    return;
  }
  for (const char* name : {"llama-awq-gemm", "qwen3"}) {
    for (const auto numerics : {weights::Numerics::kFast, weights::Numerics::kExact}) {
      SCOPED_TRACE(name);
      const Task task = {.model = testing::SourceDir() + "/tests/data/model-specs/" + name,
                         .numerics = numerics,
                         .prompt = {3, 1, 4, 1, 5, 9, 2, 6},
                         .outputs = 24};
      const std::vector<int32_t> expected = Alone(task);
      ASSERT_EQ(expected.size(), 24u);
      EXPECT_EQ(OverTwoMachines(machines, task), expected);
    }
  }
}

TEST(TwoMachines, ARealModelGivesItsGoldensOverTheNetwork) {
  const auto folder = testing::TestData("models/smollm2-135m-awq-gemm-g64",
                                        "TwoMachines.ARealModelGivesItsGoldensOverTheNetwork");
  if (!folder.has_value()) return;
  const testing::TwoNamespaces machines;
  if (!machines.made()) {
    std::fprintf(stderr, "NOT RUN: TwoMachines over two network namespaces (not permitted here)\n");
    return;
  }
  std::ifstream file(*folder + "/goldens.json");
  const nlohmann::json golden = nlohmann::json::parse(file).at("prompts").at(0);
  const auto expected = golden.at("generated_token_ids").get<std::vector<int32_t>>();
  const Task task = {.model = *folder,
                     .numerics = weights::Numerics::kExact,
                     .prompt = golden.at("prompt_token_ids").get<std::vector<int32_t>>(),
                     .outputs = static_cast<int32_t>(expected.size())};
  EXPECT_EQ(OverTwoMachines(machines, task), expected);
}

}  // namespace
}  // namespace nibble
