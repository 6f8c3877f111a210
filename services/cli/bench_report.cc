#include "services/cli/bench_report.h"

#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/units.h"
#include "services/cli/table.h"

namespace nibble::cli {
namespace {

using execution::BenchFigure;
using execution::BenchResult;
using Rows = std::vector<std::vector<std::string>>;

std::string Fixed(double value) { return absl::StrFormat("%.1f", value); }

int64_t TotalBytes(const execution::MemoryUse& use) {
  return use.weights + use.kv_cache + use.activations + use.workspace;
}

}  // namespace

std::string BenchTable(const BenchResult& result) {
  std::string text =
      absl::StrFormat("%s, %d rank%s of %d thread%s, median of %d; loaded in %.1f s\n\n",
                      result.isa, result.ranks, result.ranks == 1 ? "" : "s", result.threads,
                      result.threads == 1 ? "" : "s", result.runs, result.load_seconds);
  Rows decode = {{"decode, batch", "tokens/s", "spread", "ms a step", "sampling", "exchange"}};
  for (const execution::DecodeFigures& row : result.decode) {
    const double rate = row.tokens_per_second.value;
    decode.push_back({absl::StrCat(row.batch), Fixed(rate), Fixed(row.tokens_per_second.spread),
                      absl::StrFormat("%.2f", rate > 0 ? 1000.0 * row.batch / rate : 0),
                      absl::StrFormat("%.2f", row.sample_ms),
                      absl::StrFormat("%.2f", row.collective_ms)});
  }
  Rows prefill = {{"prefill, tokens", "tokens/s", "spread", "first token ms", "spread"}};
  for (const execution::PrefillFigures& row : result.prefill) {
    prefill.push_back({absl::StrCat(row.length), Fixed(row.tokens_per_second.value),
                       Fixed(row.tokens_per_second.spread), Fixed(row.first_token_ms.value),
                       Fixed(row.first_token_ms.spread)});
  }
  const Rows memory = {{"memory", "bytes"},
                       {"weights", FormatBytes(result.memory.weights)},
                       {"KV cache", FormatBytes(result.memory.kv_cache)},
                       {"activations", FormatBytes(result.memory.activations)},
                       {"workspace", FormatBytes(result.memory.workspace)},
                       {"all", FormatBytes(TotalBytes(result.memory))},
                       {"process, at its peak", FormatBytes(result.peak_memory_bytes)}};
  absl::StrAppend(&text, FormatTable(decode), "\n", FormatTable(prefill), "\n",
                  FormatTable(memory));
  return text;
}

nlohmann::ordered_json BenchRecords(const BenchResult& result) {
  auto records = nlohmann::ordered_json::array();
  const auto add = [&](const char* metric, const BenchFigure& figure, int32_t batch,
                       int32_t prompt) {
    records.push_back({{"metric", metric},
                       {"value", figure.value},
                       {"spread", figure.spread},
                       {"threads", result.threads},
                       {"ranks", result.ranks},
                       {"batch", batch},
                       {"prompt", prompt},
                       {"isa", result.isa},
                       {"runs", result.runs}});
  };
  for (const execution::DecodeFigures& row : result.decode) {
    add("decode_tokens_per_second", row.tokens_per_second, row.batch, 0);
  }
  for (const execution::PrefillFigures& row : result.prefill) {
    add("prefill_tokens_per_second", row.tokens_per_second, 0, row.length);
    add("first_token_ms", row.first_token_ms, 0, row.length);
  }
  const auto bytes = [](int64_t value) { return BenchFigure{.value = static_cast<double>(value)}; };
  add("executor_memory_bytes", bytes(TotalBytes(result.memory)), 0, 0);
  add("peak_memory_bytes", bytes(result.peak_memory_bytes), 0, 0);
  add("load_seconds", {.value = result.load_seconds}, 0, 0);
  return records;
}

}  // namespace nibble::cli
