#include <algorithm>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_format.h"
#include "base/exit_codes.h"
#include "base/units.h"
#include "services/cli/bench_report.h"
#include "services/cli/commands.h"
#include "services/cli/serve_options.h"
#include "worker/execution/cpu/bench.h"
#include "worker/weights/checkpoint.h"

namespace nibble::cli {
namespace {

struct Options {
  std::string model;
  std::string json;
  execution::BenchOptions bench;
};

void Declare(ConfigParser* parser, Options* options) {
  execution::BenchOptions& bench = options->bench;
  parser->Group("Model");
  parser->Folder("model", &options->model, "Folder of the model").Positional().Required();
  parser->Group("Compute");
  parser->Int("tp", &bench.ranks, {1, 64}, "Ranks that share the model, all in this process");
  parser->Int("threads", &bench.threads, {1, 1024}, "Threads of one rank");
  DeclareNumerics(parser, &bench.numerics, &bench.head);
  parser->Group("Measurements");
  parser->Ints("batches", &bench.decode_batches, {1, 4096}, "Sequences of each decode run");
  parser->Int("decode_tokens", &bench.decode_tokens, {2, 1 << 16}, "Tokens of each sequence");
  parser->Int("decode_context", &bench.decode_context, {1, 1 << 20},
              "Prompt tokens before each decode run");
  parser->Ints("prompts", &bench.prefill_lengths, {1, 1 << 20}, "Tokens of each prefill run");
  parser->Int("runs", &bench.runs, {1, 1000}, "Each figure is the median of so many");
  parser->String("json", &options->json, "File that gets the figures as records; empty: none");
}

int Fail(const std::string& message, int code) {
  std::fprintf(stderr, "nibble bench: %s\n", message.c_str());
  return code;
}

}  // namespace

int RunBench(int argc, const char* const* argv) {
  Options options;
  options.bench.threads = static_cast<int32_t>(std::max(1U, std::thread::hardware_concurrency()));
  ConfigParser parser(CommandProgram(
      "bench", "Measures decode, prefill, the first token and memory on this machine.",
      "nibble bench .cache/models/smollm2-135m-awq --threads 2 --batches 1,8 --json bench.json"));
  Declare(&parser, &options);
  if (const auto code = parser.ParseMain(argc, argv)) return *code;
  const auto checkpoint = weights::Checkpoint::Open(options.model);
  if (!checkpoint.ok()) return Fail(std::string(checkpoint.status().message()), kExitModel);
  options.bench.progress = [](const std::string& what) {
    std::fprintf(stderr, "measuring %s\n", what.c_str());
  };
  const auto result = execution::RunBench(**checkpoint, options.bench);
  if (!result.ok()) {
    const bool settings = absl::IsInvalidArgument(result.status());
    return Fail(std::string(result.status().message()), settings ? kExitConfiguration : kExitModel);
  }
  std::fputs(BenchTable(*result).c_str(), stdout);
  if (options.json.empty()) return kExitDrained;
  std::ofstream file(options.json, std::ios::trunc);
  file << BenchRecords(*result).dump(2) << "\n";
  file.close();
  if (!file) return Fail("cannot write " + options.json, kExitConfiguration);
  return kExitDrained;
}

}  // namespace nibble::cli
