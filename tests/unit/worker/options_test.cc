#include "worker/options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "worker/execution/cuda/gpu_rank.h"

namespace nibble::worker {
namespace {

WorkerOptions Parse(const std::vector<std::string>& words) {
  WorkerOptions options;
  ConfigParser parser({.name = "nibble-worker", .summary = "", .example = ""});
  DeclareOptions(&parser, &options);
  const ConfigOutcome outcome = parser.Parse(words, [](const char*) { return nullptr; });
  EXPECT_FALSE(outcome.exit_code.has_value()) << outcome.error;
  return options;
}

TEST(WorkerOptions, ARankIsToldExactlyWhatTheSupervisorWas) {
  WorkerOptions options =
      Parse({"--model=.",         "--model-name=n n",       "--tp=3",
             "--threads=5",       "--numerics=exact",       "--head=stored",
             "--max-sequences=7", "--max-step-tokens=128",  "--context=300",
             "--memory=2GiB",     "--kv-blocks=99",         "--listen=unix:/tmp/x",
             "--queue-size=9",    "--step-deadline=2500ms", "--drain-timeout=90s",
             "--log-level=debug", "--log-format=json",      "--tls-cert=c.pem",
             "--tls-key=k.pem",   "--tls-client-ca=a.pem",  "--device=cuda",
             "--fusion=off",      "--memory-fraction=0.35", "--prefix-cache=off",
             "--activations=bf16"});
  const WorkerOptions again = Parse(ToArguments(options));
  EXPECT_EQ(again.model, ".");
  EXPECT_EQ(again.model_name, "n n");
  EXPECT_EQ(again.tp, 3);
  EXPECT_EQ(again.threads, 5);
  EXPECT_EQ(again.memory.numerics, weights::Numerics::kExact);
  EXPECT_EQ(again.memory.head, weights::HeadFormat::kStored);
  EXPECT_EQ(again.memory.max_slots, 7);
  EXPECT_EQ(again.memory.max_step_tokens, 128);
  EXPECT_EQ(again.memory.max_context, 300);
  EXPECT_EQ(again.memory.memory_bytes, int64_t{2} << 30);
  EXPECT_EQ(again.memory.kv_blocks, 99);
  EXPECT_EQ(again.listen, "unix:/tmp/x");
  EXPECT_EQ(again.queue_size, 9);
  EXPECT_EQ(again.step_deadline, std::chrono::milliseconds(2500));
  EXPECT_EQ(again.drain_timeout, std::chrono::seconds(90));
  EXPECT_EQ(again.log_level, "debug");
  EXPECT_EQ(again.log_format, "json");
  EXPECT_EQ(again.tls.certificate, "c.pem");
  EXPECT_EQ(again.tls.key, "k.pem");
  EXPECT_EQ(again.tls.ca, "a.pem");
  EXPECT_TRUE(OnGpu(again));
  EXPECT_FALSE(again.fusion);
  EXPECT_EQ(again.activations, execution::Activations::kBfloat16);
  EXPECT_FALSE(again.prefix_cache);
  EXPECT_EQ(again.memory_fraction, 0.35);
  EXPECT_EQ(ToArguments(again), ToArguments(options));
}

TEST(WorkerOptions, TheConfigHashCoversWhatAStepDependsOn) {
  const WorkerOptions base;
  const auto differs = [&base](auto spoil) {
    WorkerOptions other = base;
    spoil(&other);
    return ConfigHash(other) != ConfigHash(base);
  };
  EXPECT_TRUE(differs([](auto* o) { o->tp = 2; }));
  EXPECT_TRUE(differs([](auto* o) { o->memory.numerics = weights::Numerics::kExact; }));
  EXPECT_TRUE(differs([](auto* o) { o->memory.head = weights::HeadFormat::kStored; }));
  EXPECT_TRUE(differs([](auto* o) { o->memory.max_slots = 1; }));
  EXPECT_TRUE(differs([](auto* o) { o->memory.max_step_tokens = 1; }));
  EXPECT_TRUE(differs([](auto* o) { o->memory.max_context = 1; }));
  EXPECT_TRUE(differs([](auto* o) { o->memory.memory_bytes = 1; }));
  EXPECT_TRUE(differs([](auto* o) { o->memory.kv_blocks = 1; }));
  EXPECT_TRUE(differs([](auto* o) { o->fusion = false; }));
  EXPECT_TRUE(differs([](auto* o) { o->activations = execution::Activations::kHalf; }));
  EXPECT_FALSE(differs([](auto* o) { o->listen = std::string("elsewhere:1"); }));
}

TEST(WorkerOptions, CompletingFillsInNameAndThreads) {
  WorkerOptions options;
  options.model = "/some/where/tiny-model/";
  ASSERT_TRUE(CompleteOptions(&options).ok());
  EXPECT_EQ(options.model_name, "tiny-model");
  EXPECT_GE(options.threads, 1);
}

TEST(WorkerOptions, GpusAreRefusedWhereTheBuildHasNone) {
  WorkerOptions options = Parse({"--model=.", "--device=cuda"});
  const absl::Status status = CompleteOptions(&options);
  EXPECT_EQ(status, execution::CheckGpuBuild());
  const bool named = std::string(status.message()).find("NIBBLE_CUDA") != std::string::npos;
  EXPECT_NE(status.ok(), named);
}

TEST(WorkerOptions, AMachineOfSeveralIsToldItsPlaceToo) {
  WorkerOptions options = Parse({"--model=.", "--tp=6", "--group-size=3", "--group-index=2",
                                 "--group-leader=first", "--join-timeout=7s", "--threads=1"});
  ASSERT_TRUE(CompleteOptions(&options).ok());
  EXPECT_EQ(options.group_leader, "first:50053");
  WorkerOptions again = Parse(ToArguments(options));
  ASSERT_TRUE(CompleteOptions(&again).ok());
  EXPECT_EQ(again.group_leader, "first:50053");
  EXPECT_EQ(again.join_timeout, std::chrono::seconds(7));
  EXPECT_EQ(PlaceOf(again).machines, 3);
  EXPECT_EQ(PlaceOf(again).own_ranks().first, 4);
  EXPECT_EQ(PlaceOf(again).own_ranks().count, 2);
  EXPECT_EQ(ToArguments(again), ToArguments(options));
}

TEST(WorkerOptions, ALeaderWorkerSetSaysWhatFlagsDoNot) {
  const auto env = [](const char* name) -> const char* {
    if (name == std::string("LWS_GROUP_SIZE")) return "2";
    if (name == std::string("LWS_WORKER_INDEX")) return "1";
    return name == std::string("LWS_LEADER_ADDRESS") ? "tiny-0.tiny.default" : nullptr;
  };
  WorkerOptions options = Parse({"--model=.", "--tp=2"});
  ASSERT_TRUE(TakeLeaderWorkerSet(env, &options).ok());
  ASSERT_TRUE(CompleteOptions(&options).ok());
  EXPECT_EQ(options.group_size, 2);
  EXPECT_EQ(options.group_index, 1);
  EXPECT_EQ(options.group_leader, "tiny-0.tiny.default:50053");

  WorkerOptions said =
      Parse({"--model=.", "--tp=4", "--group-size=4", "--group-index=0", "--group-leader=[::1]:9"});
  ASSERT_TRUE(TakeLeaderWorkerSet(env, &said).ok());
  ASSERT_TRUE(CompleteOptions(&said).ok());
  EXPECT_EQ(said.group_size, 4);
  EXPECT_EQ(said.group_index, 0);
  EXPECT_EQ(said.group_leader, "[::1]:9");

  const auto nonsense = [](const char*) -> const char* { return "many"; };
  WorkerOptions fresh;
  EXPECT_FALSE(TakeLeaderWorkerSet(nonsense, &fresh).ok());
}

TEST(WorkerOptions, BadValuesNameTheKeyAndWhatIsAllowed) {
  struct Case {
    void (*spoil)(WorkerOptions*);
    const char* key;
  };
  for (const Case& one :
       {Case{[](WorkerOptions* o) { o->listen = std::string("50052"); }, "listen"},
        Case{[](WorkerOptions* o) { o->listen = std::string("unix:"); }, "listen"},
        Case{[](WorkerOptions* o) { o->metrics_listen = std::string("9100"); }, "metrics_listen"},
        Case{[](WorkerOptions* o) { o->model_name = std::string("two\nlines"); }, "model_name"},
        Case{[](WorkerOptions* o) { o->model_name = std::string(201, 'x'); }, "model_name"}}) {
    WorkerOptions options;
    options.model.push_back('m');
    one.spoil(&options);
    const absl::Status status = CompleteOptions(&options);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << one.key;
    EXPECT_THAT(std::string(status.message()),
                testing::AllOf(testing::StartsWith(one.key), testing::HasSubstr("allowed: ")));
  }
}

}  // namespace
}  // namespace nibble::worker
