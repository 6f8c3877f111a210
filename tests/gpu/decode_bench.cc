// Times decode and prefill of a model with random weights on one GPU, through the executor.
//
//   decode_bench [--model mistral-7b | llama-3-8b] [--batches 1,8] [--prompt 128] [--generate 128]
//                [--prefill 512,2048] [--plain] [--eager] [--json FILE]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "base/check.h"
#include "tests/gpu/sequence_driver.h"
#include "worker/execution/cuda/cuda_executor.h"

namespace nibble::gpu_check {
namespace {

using execution::CudaExecutor;
using execution::CudaModel;

struct Options {
  std::string model = "mistral-7b";
  std::vector<int32_t> batches = {1, 8};
  std::vector<int32_t> prefill;
  int32_t prompt = 128;
  int32_t generate = 128;
  int32_t runs = 3;
  bool fusion = true;
  bool graphs = true;
  std::string json;
};

std::vector<int32_t> ParseList(const char* text) {
  std::vector<int32_t> values;
  std::stringstream stream(text);
  for (std::string item; std::getline(stream, item, ',');) values.push_back(std::stoi(item));
  return values;
}

Options ParseOptions(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--plain") {
      options.fusion = false;
      continue;
    }
    if (name == "--eager") {
      options.graphs = false;
      continue;
    }
    CHECK_MSG(i + 1 < argc, name);
    const char* value = argv[++i];
    if (name == "--model") options.model = value;
    if (name == "--batches") options.batches = ParseList(value);
    if (name == "--prefill") options.prefill = ParseList(value);
    if (name == "--prompt") options.prompt = std::stoi(value);
    if (name == "--generate") options.generate = std::stoi(value);
    if (name == "--runs") options.runs = std::stoi(value);
    if (name == "--json") options.json = value;
  }
  return options;
}

model::ModelSpec SpecOf(const std::string& name) {
  model::ModelSpec spec;
  spec.family = "llama";
  spec.hidden_size = 4096;
  spec.ffn_size = 14336;
  spec.layer_count = 32;
  spec.head_count = 32;
  spec.kv_head_count = 8;
  spec.head_dim = 128;
  spec.vocab_size = name == "llama-3-8b" ? 128256 : 32000;
  spec.max_context = 16384;
  spec.rope.theta = 1e6f;
  return spec;
}

class Bench {
 public:
  Bench(CudaExecutor* executor, const Options& options)
      : executor_(executor), options_(options), driver_(executor) {
    if (!options.json.empty()) json_ = std::fopen(options.json.c_str(), "w");
  }
  ~Bench() {
    if (json_ != nullptr) std::fclose(json_);
  }

  void Decode(int32_t batch) {
    std::vector<double> rates, step_us;
    for (int32_t run = 0; run < options_.runs; ++run) {
      for (int32_t slot = 0; slot < batch; ++slot) Prompt(slot, options_.prompt);
      const double seconds = Generate(batch, &step_us);
      rates.push_back(batch * (options_.generate - 1) / seconds);
      Close(batch);
    }
    Print("decode_tokens_per_s", batch, options_.prompt, rates);
    std::sort(step_us.begin(), step_us.end());
    std::printf("    a step on the device: median %.1f us, least %.1f\n",
                step_us[step_us.size() / 2], step_us[0]);
  }

  void Prefill(int32_t length) {
    std::vector<double> rates;
    for (int32_t run = 0; run <= options_.runs; ++run) {
      const auto begin = std::chrono::steady_clock::now();
      Prompt(0, length);
      const double seconds = Since(begin);
      if (run > 0) rates.push_back(length / seconds);  // the first loads code
      Close(1);
    }
    Print("prefill_tokens_per_s", 1, length, rates);
  }

 private:
  static double Since(std::chrono::steady_clock::time_point begin) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }

  // Up to the first sampled token.
  void Prompt(int32_t slot, int32_t length) {
    std::vector<int32_t> prompt;
    const int32_t vocab = executor_->limits().vocab_size;
    for (int32_t i = 0; i < length; ++i) prompt.push_back((i * 7919 + slot * 31) % vocab);
    driver_.OpenGreedy(slot, prompt);
    const int32_t chunk = executor_->limits().max_step_tokens;
    for (int32_t begin = 0; begin < length; begin += chunk) {
      const int32_t count = std::min(chunk, length - begin);
      driver_.Feed(
          slot, std::span(prompt).subspan(static_cast<size_t>(begin), static_cast<size_t>(count)),
          begin + count == length ? 1 : 0);
      static_cast<void>(driver_.Run());
    }
  }

  // From the first token to the last, one step ahead.
  double Generate(int32_t batch, std::vector<double>* step_us) {
    const auto launch = [&] {
      for (int32_t slot = 0; slot < batch; ++slot) driver_.FeedSampled(slot);
      driver_.Launch();
    };
    const auto begin = std::chrono::steady_clock::now();
    launch();
    for (int32_t step = 2; step < options_.generate; ++step) {
      launch();
      step_us->push_back(static_cast<double>(driver_.Wait().timings.forward_ns) / 1e3);
    }
    step_us->push_back(static_cast<double>(driver_.Wait().timings.forward_ns) / 1e3);
    return Since(begin);
  }

  void Close(int32_t batch) {
    for (int32_t slot = 0; slot < batch; ++slot) driver_.Close(slot);
    static_cast<void>(driver_.Run());
  }

  void Print(const char* metric, int32_t batch, int32_t prompt, std::vector<double> rates) {
    std::sort(rates.begin(), rates.end());
    const double median = rates[rates.size() / 2];
    const double spread = (rates.back() - rates.front()) / median;
    std::printf("%s batch %d prompt %d: %.0f (spread %.1f %%)\n", metric, batch, prompt, median,
                spread * 100);
    std::fflush(stdout);
    if (json_ == nullptr) return;
    std::fprintf(json_,
                 "{\"metric\": \"%s\", \"value\": %.1f, \"model\": \"%s\", \"tp\": 1, \"batch\": "
                 "%d, \"prompt\": %d, \"depth\": %d, \"fusion\": \"%s\", \"kv_bits\": 16, "
                 "\"runs\": %d, \"spread\": %.4f}\n",
                 metric, median, options_.model.c_str(), batch, prompt, prompt,
                 options_.fusion ? "on" : "off", options_.runs, spread);
    std::fflush(json_);
  }

  CudaExecutor* const executor_;
  const Options options_;
  SequenceDriver driver_;
  FILE* json_ = nullptr;
};

int Run(int argc, char** argv) {
  const Options options = ParseOptions(argc, argv);
  const model::ModelSpec spec = SpecOf(options.model);
  int32_t batch = 1;
  for (const int32_t each : options.batches) batch = std::max(batch, each);
  auto begin = std::chrono::steady_clock::now();
  const auto shares = weights::ComputeShares(spec, 1, 128);
  CHECK_MSG(shares.ok(), shares.status().ToString());
  auto model = CudaModel::Random(spec, shares->front(), 128, spec.max_context);
  CHECK_MSG(model.ok(), model.status().ToString());
  const int32_t blocks =
      std::max(spec.max_context / 16, batch * ((options.prompt + options.generate) / 16 + 2));
  auto executor = CudaExecutor::Create(std::move(*model), {.max_slots = batch,
                                                           .max_step_tokens = 2048,
                                                           .kv_blocks = blocks,
                                                           .fusion = options.fusion,
                                                           .graphs = options.graphs});
  CHECK_MSG(executor.ok(), executor.status().ToString());
  const auto use = (*executor)->memory_use();
  std::printf("%s ready in %.1f s: weights %.3f GB, KV %.3f GB, activations %.3f GB\n",
              options.model.c_str(),
              std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(),
              static_cast<double>(use.weights) / 1e9, static_cast<double>(use.kv_cache) / 1e9,
              static_cast<double>(use.activations) / 1e9);
  Bench bench(executor->get(), options);
  for (const int32_t each : options.batches) bench.Decode(each);
  for (const int32_t length : options.prefill) bench.Prefill(length);
  return 0;
}

}  // namespace
}  // namespace nibble::gpu_check

int main(int argc, char** argv) { return nibble::gpu_check::Run(argc, argv); }
