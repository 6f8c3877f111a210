#include "services/cli/gpu_bench_report.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/units.h"
#include "base/version.h"
#include "services/cli/table.h"

namespace nibble::cli {
namespace {

using execution::BenchFigure;
using execution::GpuBenchResult;
using execution::GpuMemoryUse;
using Rows = std::vector<std::vector<std::string>>;

constexpr char kOneRank[] =
    "NOT a figure of several GPUs: sums take an echo of the rank itself; links between GPUs, "
    "NCCL's sums (more than\n64 tokens) and its gathers of logits are left out.\n";

std::string Share(const BenchFigure& figure) {
  return absl::StrFormat("%.1f %%", figure.value > 0 ? 100 * figure.spread / figure.value : 0);
}

// Each owner with what the rank holds and what was planned.
struct MemoryRow {
  const char* name;
  int64_t actual;
  int64_t planned;
};
std::array<MemoryRow, 6> MemoryRows(const GpuBenchResult& result) {
  const GpuMemoryUse& use = result.memory;
  const weights::RankMemoryPlan& plan = result.planned;
  return {{{"weights", use.weights, plan.weight_bytes},
           {"kv_cache", use.kv_cache, plan.kv_block_bytes * plan.kv_blocks},
           {"activations", use.activations, plan.activation_bytes},
           {"workspace", use.workspace, plan.workspace_bytes},
           {"graphs", use.graphs, plan.graph_bytes},
           {"all", DeviceBytes(use), plan.total_bytes()}}};
}

// Operations of one kind of step, beside what the memory and the multiplications alone would take.
std::string OperationText(const execution::OperationTable& table, double bandwidth) {
  const std::string title =
      table.batch > 0 ? absl::StrCat("a decode step of ", table.batch, " at depth ", table.prompt)
                      : absl::StrCat("a prompt of ", table.prompt);
  Rows rows = {{title, "calls", "us each", "us", "MB read", "TB/s", "of the read's", "TFLOP/s"}};
  const auto add = [&](const std::string& name, int32_t calls, double us, int64_t bytes,
                       int64_t flops) {
    const double rate = static_cast<double>(bytes) / us * 1e-6;  // TB/s
    rows.push_back(
        {name, absl::StrCat(calls), absl::StrFormat("%.2f", us / std::max(1, calls)),
         absl::StrFormat("%.1f", us), absl::StrFormat("%.1f", static_cast<double>(bytes) * 1e-6),
         absl::StrFormat("%.2f", rate), absl::StrFormat("%.1f %%", 100 * rate * 1e12 / bandwidth),
         absl::StrFormat("%.0f", static_cast<double>(flops) / us * 1e-6)});
  };
  execution::OperationTime all;
  for (const execution::OperationTime& time : table.operations) {
    add(time.name, time.calls, time.microseconds, time.bytes, time.flops);
    all.calls += time.calls;
    all.microseconds += time.microseconds;
    all.bytes += time.bytes;
    all.flops += time.flops;
  }
  add("all", all.calls, all.microseconds, all.bytes, all.flops);
  return FormatTable(rows);
}

}  // namespace

std::string GpuBenchTable(const GpuBenchResult& result) {
  const std::string gpus = result.one_rank
                               ? absl::StrCat("one rank's share of ", result.ranks, " on one")
                               : absl::StrCat(result.ranks, " x");
  std::string text = absl::StrFormat(
      "%s %s, CUDA %s, %s, fusion %s, median of %d; loaded in %.1f s\n%s\n", gpus, result.gpu.name,
      result.gpu.driver, execution::ElementWord(result.element), result.fusion ? "on" : "off",
      result.runs, result.load_seconds, result.one_rank ? kOneRank : "");
  Rows decode = {{"decode, batch", "depth", "tokens/s", "spread", "ms a step", "on the device"}};
  for (const execution::DecodeFigures& row : result.decode) {
    const double rate = row.tokens_per_second.value;
    decode.push_back({absl::StrCat(row.batch), absl::StrCat(row.depth),
                      absl::StrFormat("%.1f", rate), Share(row.tokens_per_second),
                      absl::StrFormat("%.3f", rate > 0 ? 1000.0 * row.batch / rate : 0),
                      absl::StrFormat("%.3f", row.forward_ms)});
  }
  Rows prefill = {{"prefill, tokens", "tokens/s", "spread", "first token ms"}};
  for (const execution::PrefillFigures& row : result.prefill) {
    prefill.push_back(
        {absl::StrCat(row.length), absl::StrFormat("%.1f", row.tokens_per_second.value),
         Share(row.tokens_per_second), absl::StrFormat("%.2f", row.first_token_ms.value)});
  }
  Rows memory = {{"memory of rank 0", "bytes", "planned"}};
  for (const MemoryRow& row : MemoryRows(result)) {
    memory.push_back({row.name, FormatBytes(row.actual), FormatBytes(row.planned)});
  }
  memory.push_back({"taken before, with the context", FormatBytes(result.memory.context), ""});
  absl::StrAppend(&text, FormatTable(decode), "\n", FormatTable(prefill), "\n",
                  FormatTable(memory));
  for (const execution::OperationTable& table : result.operations) {
    absl::StrAppend(&text, "\n", OperationText(table, result.read_bandwidth));
  }
  if (!result.operations.empty()) {
    absl::StrAppendFormat(
        &text,
        "\nOperations run alone, without graphs and overlap, so a step is shorter "
        "than their sum; a time holds\nthe launch, the kernel's beginning and its "
        "end. A plain read of this GPU's memory: %.2f TB/s.\n",
        result.read_bandwidth * 1e-12);
  }
  return text;
}

GpuState AskNvidiaSmi(int32_t ordinal) {
  const std::string command = absl::StrCat(
      "nvidia-smi --query-gpu=driver_version,clocks.sm,clocks.mem --format=csv,noheader --id=",
      ordinal, " 2>/dev/null");
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(::popen(command.c_str(), "r"), ::pclose);
  std::array<char, 200> line{};
  if (pipe == nullptr || std::fgets(line.data(), line.size(), pipe.get()) == nullptr) return {};
  const std::vector<std::string> parts = absl::StrSplit(absl::StripSuffix(line.data(), "\n"), ", ");
  if (parts.size() != 3) return {};
  return {.driver = parts[0], .sm_clock = parts[1], .memory_clock = parts[2]};
}

int64_t DeviceBytes(const GpuMemoryUse& use) {
  return use.weights + use.kv_cache + use.activations + use.workspace + use.graphs;
}

nlohmann::ordered_json GpuBenchHeader(const GpuBenchResult& result, const std::string& model,
                                      const std::string& command, const GpuState& state) {
  return {{"record", "header"},
          {"model", model},
          {"gpu", result.gpu.name},
          {"gpus", result.one_rank ? 1 : result.ranks},
          {"driver", state.driver},
          {"cuda", result.gpu.driver},
          {"sm_clock", state.sm_clock},
          {"memory_clock", state.memory_clock},
          {"commit", std::string(GetBuildInfo().git_revision)},
          {"command", command}};
}

void AddGpuBenchRecords(const GpuBenchResult& result, nlohmann::ordered_json* records) {
  const auto add = [&](const std::string& metric, const BenchFigure& figure, int32_t batch,
                       int32_t prompt, int32_t depth) -> nlohmann::ordered_json& {
    records->push_back({{"metric", result.one_rank ? "one_rank_" + metric : metric},
                        {"value", figure.value},
                        {"tp", result.ranks},
                        {"batch", batch},
                        {"prompt", prompt},
                        {"depth", depth},
                        {"fusion", result.fusion ? "on" : "off"},
                        {"activations", execution::ElementWord(result.element)},
                        {"kv_bits", 16},
                        {"runs", result.runs},
                        {"spread", figure.value > 0 ? figure.spread / figure.value : 0}});
    return records->back();
  };
  for (const execution::DecodeFigures& row : result.decode) {
    add("decode_tokens_per_s", row.tokens_per_second, row.batch, row.depth, row.depth);
    add("decode_step_ms", {.value = row.forward_ms}, row.batch, row.depth, row.depth);
  }
  for (const execution::PrefillFigures& row : result.prefill) {
    add("prefill_tokens_per_s", row.tokens_per_second, 1, row.length, 0);
    add("ttft_ms", row.first_token_ms, 1, row.length, 0);
  }
  for (const MemoryRow& row : MemoryRows(result)) {
    add("device_bytes", {.value = static_cast<double>(row.actual)}, result.slots,
        result.max_step_tokens, result.positions)["owner"] = row.name;
    add("planned_bytes", {.value = static_cast<double>(row.planned)}, result.slots,
        result.max_step_tokens, result.positions)["owner"] = row.name;
  }
  add("load_seconds", {.value = result.load_seconds}, 0, 0, 0);
  if (result.read_bandwidth > 0) {
    add("read_bytes_per_s", {.value = result.read_bandwidth}, 0, 0, 0);
  }
  for (const execution::OperationTable& table : result.operations) {
    for (const execution::OperationTime& time : table.operations) {
      auto& record = add("operation_us", {.value = time.microseconds}, std::max(1, table.batch),
                         table.prompt, table.batch > 0 ? table.prompt : 0);
      record["operation"] = time.name;
      record["calls"] = time.calls;
      record["bytes"] = time.bytes;
      record["flops"] = time.flops;
    }
  }
}

}  // namespace nibble::cli
