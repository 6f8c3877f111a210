#include "services/cli/fusion_table.h"

#include <algorithm>
#include <array>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "services/cli/gpu_bench_report.h"
#include "services/cli/table.h"

namespace nibble::cli {
namespace {

// TheBloke/Mistral-7B-OpenOrca-AWQ on an A100 of 80 GB, one sequence, as many generated tokens as
// prompt tokens; its GB are GiB (its percentages are of 79.2).
// https://huggingface.co/docs/transformers/quantization/awq.
struct Published {
  int32_t length;
  double prefill, decode, gibibytes;
};
constexpr std::array<Published, 7> kFused = {{{32, 81.4899, 80.2569, 4.00},
                                              {64, 1756.1, 106.26, 4.00},
                                              {128, 2479.32, 105.631, 4.00},
                                              {256, 1813.6, 85.7485, 4.01},
                                              {512, 2848.9, 97.701, 4.11},
                                              {1024, 3044.35, 87.7323, 4.41},
                                              {2048, 2715.11, 89.4709, 5.57}}};
constexpr std::array<Published, 7> kUnfused = {{{32, 60.0984, 38.4537, 4.50},
                                                {64, 1333.67, 31.6604, 4.50},
                                                {128, 2434.06, 31.6272, 4.50},
                                                {256, 3072.26, 38.1731, 4.50},
                                                {512, 3184.74, 31.6819, 4.59},
                                                {1024, 3148.18, 36.8031, 4.81},
                                                {2048, 2927.33, 35.2676, 5.73}}};

}  // namespace

std::vector<int32_t> FusionTableLengths() {
  std::vector<int32_t> lengths;
  lengths.reserve(kFused.size());
  for (const Published& line : kFused) lengths.push_back(line.length);
  return lengths;
}

execution::GpuBenchOptions FusionTableOptions(int32_t length, bool fusion,
                                              const execution::GpuBenchOptions& options) {
  execution::GpuBenchOptions line = options;
  line.fusion = fusion;
  line.max_step_tokens = std::min(options.max_step_tokens, length);
  line.decode_batches = {1};
  line.decode_depths = {length};
  line.decode_tokens = length - 1;  // from the first generated token to the last
  line.prefill_lengths = {length};
  line.timed_batches.clear();
  line.timed_prompts.clear();
  return line;
}

void AddPublishedRecords(nlohmann::ordered_json* records) {
  for (const bool fusion : {true, false}) {
    for (const Published& line : fusion ? kFused : kUnfused) {
      const auto add = [&](const char* metric, double value) {
        records->push_back({{"metric", metric},
                            {"value", value},
                            {"tp", 1},
                            {"batch", 1},
                            {"prompt", line.length},
                            {"depth", line.length},
                            {"fusion", fusion ? "on" : "off"}});
      };
      add("published_prefill_tokens_per_s", line.prefill);
      add("published_decode_tokens_per_s", line.decode);
      add("published_gibibytes", line.gibibytes);
    }
  }
}

std::string FusionTable(std::span<const execution::GpuBenchResult> lines) {
  std::string text;
  for (const bool fusion : {true, false}) {
    std::vector<std::vector<std::string>> rows = {
        {absl::StrCat("fusion ", fusion ? "on" : "off", ", length"), "prefill tokens/s",
         "published", "decode tokens/s", "published", "times", "GiB", "published"}};
    for (const execution::GpuBenchResult& line : lines) {
      if (line.fusion != fusion || line.prefill.empty() || line.decode.empty()) continue;
      const auto& published = fusion ? kFused : kUnfused;
      const auto found = std::find_if(
          published.begin(), published.end(),
          [&](const Published& candidate) { return candidate.length == line.prefill[0].length; });
      if (found == published.end()) continue;
      const double decode = line.decode[0].tokens_per_second.value;
      rows.push_back(
          {absl::StrCat(found->length),
           absl::StrFormat("%.0f", line.prefill[0].tokens_per_second.value),
           absl::StrFormat("%.0f", found->prefill), absl::StrFormat("%.1f", decode),
           absl::StrFormat("%.1f", found->decode), absl::StrFormat("%.1f", decode / found->decode),
           absl::StrFormat("%.2f", static_cast<double>(DeviceBytes(line.memory)) / (1 << 30)),
           absl::StrFormat("%.2f", found->gibibytes)});
    }
    absl::StrAppend(&text, FormatTable(rows), "\n");
  }
  return text;
}

}  // namespace nibble::cli
