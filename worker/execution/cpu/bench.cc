#include "worker/execution/cpu/bench.h"

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <memory>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "worker/execution/cpu/local_group.h"
#include "worker/step/step_plan.h"

namespace nibble::execution {
namespace {

using SteadyTime = std::chrono::steady_clock::time_point;

double Seconds(SteadyTime begin, SteadyTime end) {
  return std::chrono::duration<double>(end - begin).count();
}

BenchFigure Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return {.value = values[values.size() / 2], .spread = values.back() - values.front()};
}

int32_t Blocks(int32_t positions) {
  return (positions + step::kBlockTokens - 1) / step::kBlockTokens;
}

// Plans for sequences in slots 0 … batch - 1, each with blocks of its own.
class PlanMaker {
 public:
  PlanMaker(int32_t vocab_size, int32_t positions)
      : vocab_size_(vocab_size), slot_blocks_(Blocks(positions)) {}

  // Feeds a slot, opened anew at position 0, tokens of no meaning; the last row may be sampled.
  const step::StepPlan& Prompt(int32_t slot, int32_t first_position, int32_t tokens, bool sample) {
    plan_.Clear();
    plan_.step_id = ++step_id_;
    if (first_position == 0) {
      plan_.opened.emplace_back();
      plan_.opened.back().slot = slot;
      plan_.opened.back().sampling.temperature = 0;
    }
    step::SequenceStep& sequence = Add(slot, first_position, tokens);
    sequence.sample_count = sample ? 1 : 0;
    for (int32_t i = 0; i < tokens; ++i) {
      const int64_t mixed = (int64_t{slot} * 7919 + first_position + i) * 2654435761 >> 7;
      plan_.token_ids.push_back(static_cast<int32_t>(mixed % vocab_size_));
    }
    return plan_;
  }

  const step::StepPlan& Decode(int32_t slots, int32_t position) {
    plan_.Clear();
    plan_.step_id = ++step_id_;
    for (int32_t slot = 0; slot < slots; ++slot) {
      step::SequenceStep& sequence = Add(slot, position, 1);
      sequence.feed_sampled = true;
      sequence.sample_count = 1;
      plan_.token_ids.push_back(-1);
    }
    return plan_;
  }

 private:
  step::SequenceStep& Add(int32_t slot, int32_t first_position, int32_t tokens) {
    step::SequenceStep& sequence = plan_.sequences.emplace_back();
    sequence.slot = slot;
    sequence.first_position = first_position;
    sequence.token_begin = static_cast<int32_t>(plan_.token_ids.size());
    sequence.token_count = tokens;
    sequence.block_table_index = Blocks(first_position);
    sequence.block_begin = static_cast<int32_t>(plan_.block_ids.size());
    sequence.block_count = Blocks(first_position + tokens) - sequence.block_table_index;
    for (int32_t i = 0; i < sequence.block_count; ++i) {
      plan_.block_ids.push_back(slot * slot_blocks_ + sequence.block_table_index + i);
    }
    return sequence;
  }

  const int32_t vocab_size_;
  const int32_t slot_blocks_;
  step::StepPlan plan_;
  uint64_t step_id_ = 0;
};

class Bench {
 public:
  Bench(LocalGroup* group, const BenchOptions& options, int32_t positions)
      : group_(group),
        options_(options),
        plans_(group->limits().vocab_size, positions),
        chunk_(group->limits().max_step_tokens) {}

  absl::StatusOr<DecodeFigures> Decode(int32_t batch);
  absl::StatusOr<PrefillFigures> Prefill(int32_t length);

 private:
  absl::Status RunPlan(const step::StepPlan& plan) {
    RETURN_IF_ERROR(group_->Launch(plan));
    return group_->Wait(Deadline::max(), &result_);
  }
  absl::Status RunPrompt(int32_t slot, int32_t length) {
    for (int32_t position = 0; position < length; position += chunk_) {
      const int32_t tokens = std::min(chunk_, length - position);
      const bool last = position + tokens == length;
      RETURN_IF_ERROR(RunPlan(plans_.Prompt(slot, position, tokens, last)));
    }
    return absl::OkStatus();
  }

  LocalGroup* const group_;
  const BenchOptions& options_;
  PlanMaker plans_;
  const int32_t chunk_;
  step::StepResult result_;
};

absl::StatusOr<DecodeFigures> Bench::Decode(int32_t batch) {
  if (options_.progress) options_.progress(absl::StrCat("decode, batch ", batch));
  DecodeFigures figures{.batch = batch};
  std::vector<double> rates;
  RETURN_IF_ERROR(RunPrompt(0, options_.decode_context));
  for (int32_t run = 0; run < options_.runs; ++run) {
    for (int32_t slot = 0; slot < batch; ++slot) {
      RETURN_IF_ERROR(RunPrompt(slot, options_.decode_context));
    }
    int64_t sample_ns = 0, collective_ns = 0;
    int32_t position = options_.decode_context;
    RETURN_IF_ERROR(group_->Launch(plans_.Decode(batch, position++)));
    const SteadyTime begin = std::chrono::steady_clock::now();
    for (int32_t i = 0; i < options_.decode_tokens; ++i) {
      RETURN_IF_ERROR(group_->Launch(plans_.Decode(batch, position++)));
      RETURN_IF_ERROR(group_->Wait(Deadline::max(), &result_));
      sample_ns += result_.timings.sample_ns;
      collective_ns += result_.timings.collective_ns;
    }
    const double seconds = Seconds(begin, std::chrono::steady_clock::now());
    RETURN_IF_ERROR(group_->Wait(Deadline::max(), &result_));
    rates.push_back(batch * options_.decode_tokens / seconds);
    figures.sample_ms = static_cast<double>(sample_ns) * 1e-6 / options_.decode_tokens;
    figures.collective_ms = static_cast<double>(collective_ns) * 1e-6 / options_.decode_tokens;
  }
  figures.tokens_per_second = Median(std::move(rates));
  return figures;
}

absl::StatusOr<PrefillFigures> Bench::Prefill(int32_t length) {
  if (options_.progress) options_.progress(absl::StrCat("prefill of ", length));
  std::vector<double> rates, first_token;
  RETURN_IF_ERROR(RunPrompt(0, length));  // touches the memory and warms the caches
  for (int32_t run = 0; run < options_.runs; ++run) {
    const SteadyTime begin = std::chrono::steady_clock::now();
    RETURN_IF_ERROR(RunPrompt(0, length));
    const double seconds = Seconds(begin, std::chrono::steady_clock::now());
    rates.push_back(length / seconds);
    first_token.push_back(seconds * 1e3);
  }
  return PrefillFigures{.length = length,
                        .tokens_per_second = Median(std::move(rates)),
                        .first_token_ms = Median(std::move(first_token))};
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
  group_options.memory.kv_blocks = group_options.memory.max_slots * Blocks(positions);
  if (options.progress) options.progress("loading");
  const SteadyTime begin = std::chrono::steady_clock::now();
  ASSIGN_OR_RETURN(auto group, LocalGroup::Create(checkpoint, group_options));
  BenchResult result{.isa = std::string(cpu::IsaLevelName(options.isa)),
                     .ranks = options.ranks,
                     .threads = options.threads,
                     .runs = options.runs};
  result.load_seconds = Seconds(begin, std::chrono::steady_clock::now());
  Bench bench(group.get(), options, positions);
  for (const int32_t length : options.prefill_lengths) {
    ASSIGN_OR_RETURN(PrefillFigures figures, bench.Prefill(length));
    result.prefill.push_back(figures);
  }
  for (const int32_t batch : options.decode_batches) {
    ASSIGN_OR_RETURN(DecodeFigures figures, bench.Decode(batch));
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
