// The narrow waist: what the scheduler asks of an executor, and what it gets back.
//
// Plain data, the same bytes on every rank. The scheduler knows no device, the
// executor no requests. Vectors are cleared and reused from step to step, so
// that a warmed-up engine does not allocate.
#pragma once

#include <cstdint>
#include <vector>

namespace nibble::step {

inline constexpr int32_t kBlockTokens = 16;  // positions in one KV block
inline constexpr int32_t kMaxLogprobs = 20;

struct LogitBias {
  int32_t token_id = 0;
  float bias = 0;
};

// Order of application: penalties, logit_bias, min_tokens mask, temperature,
// top_k, typical_p, top_p, min_p, sample. temperature < 1e-5 is greedy.
struct SamplingParams {
  float temperature = 1;
  float top_p = 1;      // (0, 1]; 1 is off
  float min_p = 0;      // [0, 1]; 0 is off
  float typical_p = 1;  // (0, 1]; 1 is off
  int32_t top_k = 0;    // 0 is off
  float presence_penalty = 0;
  float frequency_penalty = 0;
  float repetition_penalty = 1;  // over prompt and output; the other two over output only
  std::vector<LogitBias> logit_bias = {};
};

// Makes a slot ready for a sequence: at admission, and again after preemption.
struct SlotSetup {
  int32_t slot = 0;
  uint64_t seed = 0;
  SamplingParams sampling;
  std::vector<int32_t> stop_ids;  // may not be sampled before min_tokens outputs
  int32_t min_tokens = 0;
  std::vector<int32_t> history;  // prompt, then the tokens generated so far
  int32_t prompt_count = 0;      // how many of history are prompt
};

enum class MaskSource : uint8_t { kNone, kHere, kLate };

// One sequence's share of a step. Input tokens are StepPlan::token_ids
// [token_begin, token_begin + token_count), at consecutive positions.
struct SequenceStep {
  int32_t slot = 0;
  int32_t first_position = 0;
  int32_t token_begin = 0;
  int32_t token_count = 0;
  // The first input token is the token this slot sampled last (its place in
  // token_ids holds -1): the executor feeds it to itself.
  bool feed_sampled = false;
  // New entries of the slot's block table: StepPlan::block_ids[block_begin, +block_count)
  // are written at table index block_table_index. An entry covers kBlockTokens positions.
  int32_t block_table_index = 0;
  int32_t block_begin = 0;
  int32_t block_count = 0;
  int32_t draft_count = 0;   // how many trailing input tokens are drafts
  int32_t sample_count = 0;  // trailing rows to sample: 0 (a prefill chunk) or 1 + draft_count
  int32_t logprobs = -1;     // -1 none, else 0…kMaxLogprobs alternatives beside the sampled token
  MaskSource mask = MaskSource::kNone;
};

// Contents of one KV block copied to another, before the step's own writes.
struct BlockCopy {
  int32_t from = 0;
  int32_t to = 0;
};

// Applied in this order: slots closed, slots opened, block copies, sequences.
struct StepPlan {
  uint64_t step_id = 0;
  std::vector<int32_t> closed;
  std::vector<SlotSetup> opened;
  std::vector<BlockCopy> block_copies;
  std::vector<SequenceStep> sequences;
  std::vector<int32_t> token_ids;
  std::vector<int32_t> block_ids;
  std::vector<uint32_t> mask_words;  // kHere masks in sequence order, mask_stride words a row
  int32_t mask_stride = 0;

  void Clear();
};

// Late masks of one step: per kLate row, one bit per token id (1 = allowed).
struct MaskBatch {
  uint64_t step_id = 0;
  std::vector<uint32_t> mask_words;
  int32_t mask_stride = 0;
};

struct TokenLogprob {
  int32_t token_id = 0;
  float logprob = 0;  // natural logarithm, of the distribution before temperature and filters
};

// Outputs of one sequence: StepResult::tokens [token_begin, +token_count), and for each of
// those top_count alternatives in StepResult::top_logprobs from top_begin on.
struct SampledSequence {
  int32_t slot = 0;
  int32_t token_begin = 0;
  int32_t token_count = 0;  // 1 … 1 + drafts; 0 when non_finite
  int32_t top_begin = 0;
  int32_t top_count = 0;
  bool non_finite = false;  // a logit was NaN or +infinity: this sequence ends, others go on
};

struct StepTimings {
  int64_t forward_ns = 0;
  int64_t sample_ns = 0;
  int64_t collective_ns = 0;
};

struct StepResult {
  uint64_t step_id = 0;
  std::vector<SampledSequence> sequences;  // those with sample_count > 0, in plan order
  std::vector<TokenLogprob> tokens;        // logprob is set only where logprobs >= 0
  std::vector<TokenLogprob> top_logprobs;  // most probable first
  StepTimings timings;

  void Clear();
};

}  // namespace nibble::step
