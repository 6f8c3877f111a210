// A worker group as processes: what it generates, what it refuses, what it exports.

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "base/exit_codes.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "tests/integration/worker/worker_process.h"
#include "tests/support/test_data.h"

namespace nibble::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

// 6 query heads over 3 KV heads, 2 layers, group 32, vocabulary 256, context 256.
std::string TinyModel() { return SourceDir() + "/tests/data/model-specs/llama-awq-gemm"; }

std::vector<std::string> Tiny(std::vector<std::string> flags) {
  flags.push_back("--model=" + TinyModel());
  flags.push_back("--threads=1");
  return flags;
}

TEST(WorkerServing, EveryDegreeGeneratesTheSame) {
  std::vector<std::vector<int32_t>> outputs;
  for (const int ranks : {1, 2, 3}) {
    WorkerProcess worker(Tiny({"--tp=" + std::to_string(ranks), "--numerics=exact"}));
    ASSERT_TRUE(worker.AwaitServing());
    EXPECT_EQ(worker.ranks().size(), static_cast<size_t>(ranks));
    const StreamResult result = Generate(&worker.stub(), GreedyRequest({3, 14, 15, 92}, 40));
    ASSERT_TRUE(result.status.ok()) << result.status.error_message();
    EXPECT_EQ(result.ids.size(), 40u);
    ASSERT_TRUE(result.finished.has_value());
    EXPECT_EQ(result.finished->completion_tokens(), 40u);
    EXPECT_EQ(result.finished->reason(), worker::v1::FINISH_REASON_LENGTH);
    outputs.push_back(result.ids);
    EXPECT_EQ(outputs.back(), outputs.front()) << ranks << " ranks";
  }
}

// Against tokens that transformers computed from the same checkpoint.
TEST(WorkerServing, TwoRanksGiveTheGoldenTokens) {
  const auto folder = TestData("models/smollm2-135m-awq-gemm-g64", "TwoRanksGiveTheGoldenTokens");
  if (!folder.has_value()) return;
  std::ifstream file(*folder + "/goldens.json");
  const auto golden = nlohmann::json::parse(file).at("prompts").at(0);
  WorkerProcess worker(
      {"--model=" + *folder, "--tp=2", "--numerics=exact", "--context=512", "--max-sequences=4"});
  ASSERT_TRUE(worker.AwaitServing(seconds(120)));
  const StreamResult result = Generate(
      &worker.stub(), GreedyRequest(golden.at("prompt_token_ids").get<std::vector<int32_t>>(), 64));
  ASSERT_TRUE(result.status.ok()) << result.status.error_message();
  EXPECT_EQ(result.ids, golden.at("generated_token_ids").get<std::vector<int32_t>>());

  worker::v1::GetModelInfoResponse info;
  grpc::ClientContext context;
  ASSERT_TRUE(worker.stub().GetModelInfo(&context, {}, &info).ok());
  EXPECT_EQ(info.model(), "smollm2-135m-awq-gemm-g64");
  EXPECT_EQ(info.architecture(), "LlamaForCausalLM");
  EXPECT_EQ(info.quantization(), "gemm");
  EXPECT_EQ(info.context_length(), 512u);
  EXPECT_EQ(info.tensor_parallel(), 2u);
  EXPECT_EQ(info.tokenizer_hash().size(), 64u);

  grpc::ClientContext files_context;
  auto files = worker.stub().GetTokenizer(&files_context, {});
  worker::v1::GetTokenizerResponse chunk;
  std::string tokenizer_json;
  while (files->Read(&chunk)) {
    if (chunk.file() == "tokenizer.json") tokenizer_json += chunk.chunk();
  }
  EXPECT_TRUE(files->Finish().ok());
  EXPECT_EQ(tokenizer_json.size(), std::filesystem::file_size(*folder + "/tokenizer.json"));
}

TEST(WorkerServing, ExportsMetricsProbesAndHealth) {
  WorkerProcess worker(Tiny({"--tp=2", "--model-name=tiny"}));
  ASSERT_TRUE(worker.AwaitServing());
  ASSERT_TRUE(Generate(&worker.stub(), GreedyRequest({1, 2, 3}, 10)).status.ok());

  int status = 0;
  EXPECT_EQ(worker.Get("/healthz", &status), "ok\n");
  EXPECT_EQ(status, 200);
  EXPECT_EQ(worker.Get("/readyz", &status), "ok\n");
  EXPECT_EQ(worker.Metric("nibble_generated_tokens_total{model=\"tiny\"}"), 10);
  EXPECT_EQ(worker.Metric("nibble_prompt_tokens_total{model=\"tiny\",source=\"computed\"}"), 3);
  EXPECT_EQ(worker.Metric("nibble_requests_total{model=\"tiny\",code=\"OK\","
                          "finish_reason=\"length\"}"),
            1);
  EXPECT_EQ(worker.Metric("nibble_model_ready{model=\"tiny\"}"), 1);
  for (const std::string rank : {"0", "1"}) {
    const std::string of_rank = "model=\"tiny\",rank=\"" + rank + "\"}";
    EXPECT_EQ(worker.Metric("nibble_rank_up{" + of_rank), 1);
    EXPECT_GT(worker.Metric("nibble_rank_steps_total{" + of_rank), 10);
    EXPECT_GT(worker.Metric("nibble_collective_bytes_total{" + of_rank), 0);
    for (const std::string kind : {"weights", "kv_cache", "activations", "workspace"}) {
      const std::string labels =
          "{model=\"tiny\",device=\"cpu\",rank=\"" + rank + "\",kind=\"" + kind + "\"}";
      const double planned = worker.Metric("nibble_memory_planned_bytes" + labels);
      EXPECT_GT(planned, 0) << kind;
      EXPECT_EQ(worker.Metric("nibble_memory_bytes" + labels), planned) << kind;
    }
  }

  auto health = grpc::health::v1::Health::NewStub(
      grpc::CreateChannel(worker.grpc_address(), grpc::InsecureChannelCredentials()));
  for (const char* service : {"", "nibble.worker.v1.WorkerService"}) {
    grpc::ClientContext context;
    grpc::health::v1::HealthCheckRequest request;
    request.set_service(service);
    grpc::health::v1::HealthCheckResponse response;
    ASSERT_TRUE(health->Check(&context, request, &response).ok());
    EXPECT_EQ(response.status(), grpc::health::v1::HealthCheckResponse::SERVING);
  }
}

TEST(WorkerServing, ACancelledStreamLeavesNothingBehind) {
  WorkerProcess worker(Tiny({"--tp=2", "--model-name=tiny"}));
  ASSERT_TRUE(worker.AwaitServing());
  for (int i = 0; i < 20; ++i) {
    grpc::ClientContext context;
    auto stream = worker.stub().Generate(&context, GreedyRequest({1, 2, 3}, 250));
    worker::v1::GenerateResponse response;
    for (int read = 0; read <= i % 5; ++read) stream->Read(&response);
    context.TryCancel();
    while (stream->Read(&response)) {
    }
    (void)stream->Finish();
  }
  // The idle law, once what was cancelled has left.
  const auto until = std::chrono::steady_clock::now() + seconds(10);
  while (worker.Metric("nibble_requests_running{model=\"tiny\"}") != 0 &&
         std::chrono::steady_clock::now() < until) {
    std::this_thread::sleep_for(milliseconds(5));
  }
  for (const char* metric :
       {"nibble_requests_running{model=\"tiny\"}",
        "nibble_requests_waiting{model=\"tiny\",reason=\"capacity\"}",
        "nibble_slots_used{model=\"tiny\"}", "nibble_steps_in_flight{model=\"tiny\"}",
        "nibble_kv_cache_blocks{model=\"tiny\",state=\"used\"}",
        "nibble_kv_cache_blocks{model=\"tiny\",state=\"quarantined\"}"}) {
    EXPECT_EQ(worker.Metric(metric), 0) << metric;
  }
}

// ---- Refusals: one line, the right exit code, and no port opened ----

void ExpectRefusal(std::vector<std::string> flags, int exit_code, const std::string& words) {
  WorkerProcess worker(std::move(flags));
  EXPECT_EQ(worker.AwaitExit(seconds(30)), exit_code) << words;
  const std::string errors = worker.Errors();
  EXPECT_THAT(errors, ::testing::HasSubstr(words));
  EXPECT_EQ(std::count(errors.begin(), errors.end(), '\n'), 1) << errors;
}

TEST(WorkerRefusals, BadFlags) {
  ExpectRefusal({"--model=.", "--tp=0"}, kExitConfiguration, "tp");
  ExpectRefusal({"--model=.", "--tp=two"}, kExitConfiguration, "two");
  ExpectRefusal({"--model=.", "--no-such-flag=1"}, kExitConfiguration, "no-such-flag");
  ExpectRefusal({"--tp=1"}, kExitConfiguration, "model");
  ExpectRefusal({"--model=.", "--listen=nowhere"}, kExitConfiguration, "listen");
  ExpectRefusal({"--model=.", "--metrics-listen=nowhere"}, kExitConfiguration, "metrics_listen");
  ExpectRefusal({"--model=.", "--numerics=rough"}, kExitConfiguration, "rough");
  ExpectRefusal(Tiny({"--tp=7"}), kExitConfiguration, "7");
}

TEST(WorkerRefusals, BadModels) {
  ExpectRefusal({"--model=/nonexistent/model"}, kExitConfiguration,
                "model is \"/nonexistent/model\"");
  const std::filesystem::path folder =
      std::filesystem::temp_directory_path() / ("bad-model-" + std::to_string(::getpid()));
  std::filesystem::create_directories(folder);
  ExpectRefusal({"--model=" + folder.string()}, kExitModel, "config.json");
  std::filesystem::copy(TinyModel(), folder);
  std::filesystem::resize_file(folder / "model.safetensors", 5000);
  ExpectRefusal({"--model=" + folder.string()}, kExitModel, "model.safetensors");
  std::filesystem::remove_all(folder);
}

TEST(WorkerRefusals, AModelThatDoesNotFit) {
  ExpectRefusal(Tiny({"--memory=100KiB"}), kExitNoMemory, "");
}

TEST(WorkerRefusals, PortsThatAreTaken) {
  WorkerProcess first(Tiny({}));
  ASSERT_TRUE(first.AwaitServing());
  ExpectRefusal(Tiny({"--listen=" + first.grpc_address()}), kExitConfiguration,
                first.grpc_address());
  WorkerProcess second(Tiny({"--log-level=error", "--metrics-listen=" + first.metrics_address()}));
  EXPECT_EQ(second.AwaitExit(seconds(30)), kExitConfiguration);
  EXPECT_THAT(second.Errors(), ::testing::HasSubstr(first.metrics_address()));
  EXPECT_TRUE(Generate(&first.stub(), GreedyRequest({1}, 5)).status.ok());
}

}  // namespace
}  // namespace nibble::testing
