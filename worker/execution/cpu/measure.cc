#include "worker/execution/cpu/measure.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "base/status.h"

namespace nibble::execution {
namespace {

using SteadyTime = std::chrono::steady_clock::time_point;

double Seconds(SteadyTime begin, SteadyTime end) {
  return std::chrono::duration<double>(end - begin).count();
}

double MedianOf(std::vector<double>* values) {
  std::sort(values->begin(), values->end());
  const size_t middle = values->size() / 2;
  const double upper = (*values)[middle];
  return values->size() % 2 == 1 ? upper : ((*values)[middle - 1] + upper) / 2;
}

BenchFigure FigureOf(std::vector<double> values) {
  const double median = MedianOf(&values);
  return {.value = median, .spread = values.back() - values.front()};
}

int32_t Blocks(int32_t positions) {
  return (positions + step::kBlockTokens - 1) / step::kBlockTokens;
}

}  // namespace

int32_t BenchBlocks(int32_t slots, int32_t positions) { return slots * Blocks(positions); }

Measurement::Measurement(step::Executor* executor, int32_t runs)
    : executor_(executor), runs_(runs) {}

// Feeds a slot, opened anew at position 0; the last row may be sampled.
const step::StepPlan& Measurement::PromptPlan(int32_t slot, int32_t first_position, int32_t tokens,
                                              bool sample) {
  plan_.Clear();
  plan_.step_id = ++step_id_;
  if (first_position == 0) {
    plan_.opened.emplace_back();
    plan_.opened.back().slot = slot;
    plan_.opened.back().sampling.temperature = 0;
  }
  step::SequenceStep& sequence = Add(slot, first_position, tokens);
  sequence.sample_count = sample ? 1 : 0;
  const int32_t vocab_size = executor_->limits().vocab_size;
  for (int32_t i = 0; i < tokens; ++i) {
    const int64_t mixed = (int64_t{slot} * 7919 + first_position + i) * 2654435761 >> 7;
    plan_.token_ids.push_back(static_cast<int32_t>(mixed % vocab_size));
  }
  return plan_;
}

const step::StepPlan& Measurement::DecodePlan(int32_t slots, int32_t position) {
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

step::SequenceStep& Measurement::Add(int32_t slot, int32_t first_position, int32_t tokens) {
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

absl::Status Measurement::RunPlan(const step::StepPlan& plan) {
  RETURN_IF_ERROR(executor_->Launch(plan));
  return executor_->Wait(Deadline::max(), &result_);
}

absl::Status Measurement::RunPrompt(int32_t slot, int32_t length) {
  const int32_t chunk = executor_->limits().max_step_tokens;
  for (int32_t position = 0; position < length; position += chunk) {
    const int32_t tokens = std::min(chunk, length - position);
    RETURN_IF_ERROR(RunPlan(PromptPlan(slot, position, tokens, position + tokens == length)));
  }
  return absl::OkStatus();
}

absl::StatusOr<DecodeFigures> Measurement::Decode(int32_t batch, int32_t depth, int32_t tokens) {
  DecodeFigures figures{.batch = batch, .depth = depth};
  slot_blocks_ = Blocks(depth + tokens + 2);
  std::vector<double> rates, forward_ms;
  RETURN_IF_ERROR(RunPrompt(0, depth));
  for (int32_t run = 0; run < runs_; ++run) {
    for (int32_t slot = 0; slot < batch; ++slot) RETURN_IF_ERROR(RunPrompt(slot, depth));
    int64_t sample_ns = 0, collective_ns = 0;
    int32_t position = depth;
    const SteadyTime begin = std::chrono::steady_clock::now();
    RETURN_IF_ERROR(executor_->Launch(DecodePlan(batch, position++)));
    for (int32_t i = 0; i < tokens; ++i) {
      if (i + 1 < tokens) RETURN_IF_ERROR(executor_->Launch(DecodePlan(batch, position++)));
      RETURN_IF_ERROR(executor_->Wait(Deadline::max(), &result_));
      forward_ms.push_back(static_cast<double>(result_.timings.forward_ns) * 1e-6);
      sample_ns += result_.timings.sample_ns;
      collective_ns += result_.timings.collective_ns;
    }
    const double seconds = Seconds(begin, std::chrono::steady_clock::now());
    rates.push_back(batch * tokens / seconds);
    figures.sample_ms = static_cast<double>(sample_ns) * 1e-6 / tokens;
    figures.collective_ms = static_cast<double>(collective_ns) * 1e-6 / tokens;
  }
  figures.forward_ms = MedianOf(&forward_ms);
  figures.tokens_per_second = FigureOf(std::move(rates));
  return figures;
}

absl::StatusOr<PrefillFigures> Measurement::Prefill(int32_t length) {
  slot_blocks_ = Blocks(length);
  std::vector<double> rates, first_token;
  RETURN_IF_ERROR(RunPrompt(0, length));  // touches the memory and warms the caches
  for (int32_t run = 0; run < runs_; ++run) {
    const SteadyTime begin = std::chrono::steady_clock::now();
    RETURN_IF_ERROR(RunPrompt(0, length));
    const double seconds = Seconds(begin, std::chrono::steady_clock::now());
    rates.push_back(length / seconds);
    first_token.push_back(seconds * 1e3);
  }
  return PrefillFigures{.length = length,
                        .tokens_per_second = FigureOf(std::move(rates)),
                        .first_token_ms = FigureOf(std::move(first_token))};
}

}  // namespace nibble::execution
