#include <algorithm>
#include <cstdio>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/exit_codes.h"
#include "base/units.h"
#include "services/cli/bench_report.h"
#include "services/cli/commands.h"
#include "services/cli/fusion_table.h"
#include "services/cli/gpu_bench_report.h"
#include "services/cli/serve_options.h"
#include "worker/execution/cpu/bench.h"
#include "worker/execution/cuda/gpu_bench.h"
#include "worker/model/known_shapes.h"
#include "worker/weights/checkpoint.h"

namespace nibble::cli {
namespace {

struct Options {
  std::string model;
  std::string random;  // a shape's name, in the model's place
  std::string json;
  std::string device = "cpu";
  bool fusion_table = false;  // in the place of what the other options name
  GpuChoice gpu_choice;
  int32_t decode_tokens = 0;
  std::vector<int32_t> batches;
  std::vector<int32_t> prompts;
  execution::BenchOptions bench;
  execution::GpuBenchOptions gpu;
};

void Declare(ConfigParser* parser, Options* options) {
  execution::BenchOptions& bench = options->bench;
  parser->Group("Model");
  parser->Folder("model", &options->model, "Folder of the model").Positional();
  std::vector<std::pair<std::string, std::string>> shapes;
  for (const std::string& name : model::KnownShapeNames()) shapes.emplace_back(name, name);
  parser->Choice<std::string>("random", &options->random, shapes,
                              "Random weights of a shape instead of a model; GPUs only");
  parser->Group("Compute");
  parser->Int("tp", &bench.ranks, {1, 64}, "Ranks that share the model");
  parser->Bool(
      "one_rank", &options->gpu.one_rank,
      "With --tp N, on one GPU: the time of rank 0's share of N ranks, each sum taken with "
      "an echo of the rank itself. Leaves out the links between GPUs and all that NCCL "
      "does (sums of more than 64 tokens, gathered logits): no figure of N GPUs");
  DeclareDevice(parser, &options->device, &options->gpu_choice);
  parser->Int("max_step_tokens", &options->gpu.max_step_tokens, {16, 1 << 16},
              "Tokens of one step on a GPU");
  parser->Int("threads", &bench.threads, {1, 1024}, "Threads of one rank");
  DeclareNumerics(parser, &bench.numerics, &bench.head);
  parser->Group("Measurements");
  parser->Ints("batches", &options->batches, {1, 4096},
               "Sequences of each decode run; unset: 1,4,16, on GPUs 1,8");
  parser->Int("decode_tokens", &options->decode_tokens, {0, 1 << 16},
              "Timed tokens of each sequence; 0: 64, on GPUs 127");
  parser->Int("decode_context", &bench.decode_context, {1, 1 << 20},
              "Prompt tokens before each decode run on the CPU");
  parser->Ints("depths", &options->gpu.decode_depths, {1, 1 << 20},
               "Prompt tokens before each decode run on GPUs");
  parser->Ints("prompts", &options->prompts, {1, 1 << 20},
               "Tokens of each prefill run; unset: 128,512, on GPUs 512,2048");
  parser->Ints("kernels", &options->gpu.timed_batches, {1, 4096},
               "Batches whose operations are timed one by one on a GPU");
  parser->Ints("prompt_kernels", &options->gpu.timed_prompts, {1, 1 << 16},
               "Prompts, of one step each, whose operations are timed one by one on a GPU");
  parser->Choice<bool>("table", &options->fusion_table, {{"figures", false}, {"autoawq", true}},
                       "autoawq: in the other figures' place, on one GPU, the table of fused "
                       "modules of the transformers documentation, beside its figures");
  parser->Int("runs", &bench.runs, {1, 1000}, "Each figure is the median of so many");
  parser->String("json", &options->json, "File that gets the figures as records; empty: none");
}

int Fail(const std::string& message, int code) {
  std::fprintf(stderr, "nibble bench: %s\n", message.c_str());
  return code;
}

int WriteRecords(const std::string& path, const nlohmann::ordered_json& records) {
  if (path.empty()) return kExitDrained;
  std::ofstream file(path, std::ios::trunc);
  file << records.dump(2) << "\n";
  file.close();
  if (!file) return Fail("cannot write " + path, kExitConfiguration);
  return kExitDrained;
}

int ExitCodeOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kUnimplemented:
      return kExitConfiguration;
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kResourceExhausted:
      return kExitNoMemory;
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kDeadlineExceeded:
      return kExitRankLost;
    default:
      return kExitDeviceFault;
  }
}

using GpuBenchResults = absl::StatusOr<std::vector<execution::GpuBenchResult>>;

GpuBenchResults MeasureFigures(const execution::GpuModelSource& source,
                               const execution::GpuBenchOptions& options) {
  auto result = execution::RunGpuBench(source, options);
  if (!result.ok()) return result.status();
  return std::vector<execution::GpuBenchResult>{*std::move(result)};
}

GpuBenchResults MeasureFusionTable(const execution::GpuModelSource& source,
                                   const execution::GpuBenchOptions& options) {
  if (options.ranks != 1) return absl::InvalidArgumentError("--table autoawq is for one GPU");
  std::vector<execution::GpuBenchResult> lines;
  for (const bool fusion : {true, false}) {
    for (const int32_t length : FusionTableLengths()) {
      auto line = execution::RunGpuBench(source, FusionTableOptions(length, fusion, options));
      if (!line.ok()) return line.status();
      lines.push_back(*std::move(line));
    }
  }
  return lines;
}

int BenchOnGpu(const Options& options, const std::string& command) {
  execution::GpuModelSource source;
  std::unique_ptr<weights::Checkpoint> checkpoint;
  if (!options.random.empty()) {
    const auto shape = model::FindKnownShape(options.random);
    source.spec = shape->spec;
    source.group = shape->group;
  } else {
    auto opened = weights::Checkpoint::Open(options.model);
    if (!opened.ok()) return Fail(std::string(opened.status().message()), kExitModel);
    checkpoint = *std::move(opened);
    source.checkpoint = checkpoint.get();
  }
  auto results = options.fusion_table ? MeasureFusionTable(source, options.gpu)
                                      : MeasureFigures(source, options.gpu);
  if (!results.ok()) {
    return Fail(std::string(results.status().message()), ExitCodeOf(results.status()));
  }
  std::fputs(options.fusion_table ? FusionTable(*results).c_str()
                                  : GpuBenchTable(results->front()).c_str(),
             stdout);
  const execution::GpuBenchResult& first = results->front();
  const std::string name = options.random.empty() ? options.model : options.random;
  auto records = nlohmann::ordered_json::array();
  records.push_back(GpuBenchHeader(first, name, command, AskNvidiaSmi(first.gpu.ordinal)));
  for (const execution::GpuBenchResult& result : *results) AddGpuBenchRecords(result, &records);
  if (options.fusion_table) AddPublishedRecords(&records);
  return WriteRecords(options.json, records);
}

int BenchOnCpu(const Options& options) {
  const auto checkpoint = weights::Checkpoint::Open(options.model);
  if (!checkpoint.ok()) return Fail(std::string(checkpoint.status().message()), kExitModel);
  const auto result = execution::RunBench(**checkpoint, options.bench);
  if (!result.ok()) {
    const bool settings = absl::IsInvalidArgument(result.status());
    return Fail(std::string(result.status().message()), settings ? kExitConfiguration : kExitModel);
  }
  std::fputs(BenchTable(*result).c_str(), stdout);
  return WriteRecords(options.json, BenchRecords(*result));
}

// What both devices have in common, given once.
void Complete(Options* options) {
  options->gpu.ranks = options->bench.ranks;
  options->gpu.runs = options->bench.runs;
  options->gpu.fusion = options->gpu_choice.fusion;
  options->gpu.activations = options->gpu_choice.activations;
  if (options->decode_tokens > 0) {
    options->bench.decode_tokens = options->gpu.decode_tokens = options->decode_tokens;
  }
  if (!options->batches.empty()) {
    options->bench.decode_batches = options->gpu.decode_batches = options->batches;
  }
  if (!options->prompts.empty()) {
    options->bench.prefill_lengths = options->gpu.prefill_lengths = options->prompts;
  }
  options->bench.progress = options->gpu.progress = [](const std::string& what) {
    std::fprintf(stderr, "measuring %s\n", what.c_str());
  };
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
  if (const auto status = CheckDevice(options.device); !status.ok()) {
    return Fail(std::string(status.message()), kExitConfiguration);
  }
  const bool on_gpu = options.device == "cuda";
  if (options.model.empty() == options.random.empty() || (!on_gpu && !options.random.empty())) {
    return Fail("one of a model folder and, with --device cuda, --random SHAPE is needed",
                kExitConfiguration);
  }
  Complete(&options);
  if (!on_gpu) return BenchOnCpu(options);
  std::string command = "nibble bench";
  for (int i = 1; i < argc; ++i) absl::StrAppend(&command, " ", argv[i]);
  return BenchOnGpu(options, command);
}

}  // namespace nibble::cli
