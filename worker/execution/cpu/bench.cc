#include "worker/execution/cpu/bench.h"

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <memory>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "worker/execution/cpu/local_group.h"

namespace nibble::execution {
namespace {

using SteadyTime = std::chrono::steady_clock::time_point;

double Seconds(SteadyTime begin, SteadyTime end) {
  return std::chrono::duration<double>(end - begin).count();
}

int64_t PeakMemory() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return int64_t{usage.ru_maxrss} * 1024;
}

// Positions that the longest run of one sequence needs.
int32_t LongestRun(const BenchOptions& options) {
  int32_t longest = options.decode_context + options.decode_tokens + 2;
  for (const int32_t length : options.prefill_lengths) longest = std::max(longest, length);
  return longest;
}

absl::Status CheckOptions(const weights::Checkpoint& checkpoint, const BenchOptions& options) {
  const auto check = [](const char* what, int64_t value, int64_t limit) -> absl::Status {
    if (value >= 1 && value <= limit) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("bench: ", what, " is ", value, "; allowed: 1 … ", limit));
  };
  const int32_t context = checkpoint.spec().max_context;
  RETURN_IF_ERROR(check("runs", options.runs, 1000));
  RETURN_IF_ERROR(check("decode context", options.decode_context, context));
  RETURN_IF_ERROR(check("decode tokens", options.decode_tokens, context));
  for (const int32_t batch : options.decode_batches) {
    RETURN_IF_ERROR(check("a decode batch", batch, 512));
  }
  for (const int32_t length : options.prefill_lengths) {
    RETURN_IF_ERROR(check("a prefill length", length, context));
  }
  return check("the longest sequence", LongestRun(options), context);
}

}  // namespace

absl::StatusOr<BenchResult> RunBench(const weights::Checkpoint& checkpoint,
                                     const BenchOptions& options) {
  RETURN_IF_ERROR(CheckOptions(checkpoint, options));
  const int32_t positions = LongestRun(options);
  LocalGroup::Options group_options{
      .ranks = options.ranks, .threads = options.threads, .isa = options.isa};
  group_options.memory.numerics = options.numerics;
  group_options.memory.head = options.head;
  group_options.memory.max_context = positions;
  for (const int32_t batch : options.decode_batches) {
    group_options.memory.max_slots = std::max(group_options.memory.max_slots, batch);
  }
  group_options.memory.kv_blocks = BenchBlocks(group_options.memory.max_slots, positions);
  if (options.progress) options.progress("loading");
  const SteadyTime begin = std::chrono::steady_clock::now();
  ASSIGN_OR_RETURN(auto group, LocalGroup::Create(checkpoint, group_options));
  BenchResult result{.isa = std::string(cpu::IsaLevelName(options.isa)),
                     .ranks = options.ranks,
                     .threads = options.threads,
                     .runs = options.runs};
  result.load_seconds = Seconds(begin, std::chrono::steady_clock::now());
  Measurement measurement(group.get(), options.runs);
  for (const int32_t length : options.prefill_lengths) {
    if (options.progress) options.progress(absl::StrCat("prefill of ", length));
    ASSIGN_OR_RETURN(PrefillFigures figures, measurement.Prefill(length));
    result.prefill.push_back(figures);
  }
  for (const int32_t batch : options.decode_batches) {
    if (options.progress) options.progress(absl::StrCat("decode, batch ", batch));
    ASSIGN_OR_RETURN(DecodeFigures figures,
                     measurement.Decode(batch, options.decode_context, options.decode_tokens));
    result.decode.push_back(figures);
  }
  for (int32_t rank = 0; rank < options.ranks; ++rank) {
    const MemoryUse use = group->rank(rank).memory_use();
    result.memory.weights += use.weights;
    result.memory.kv_cache += use.kv_cache;
    result.memory.activations += use.activations;
    result.memory.workspace += use.workspace;
  }
  result.peak_memory_bytes = PeakMemory();
  return result;
}

}  // namespace nibble::execution
