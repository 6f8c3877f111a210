// Sampling one row of logits: what every rank does with the same bytes, and gets the same token.
//
// Order: penalties, logit_bias, masks (min_tokens, grammar), temperature, top_k, typical_p, top_p,
// min_p, sample; each filter works on the distribution that the one before it left, renormalised.
// Ties go to the lower token id everywhere. Sampling takes the token with the largest
// logit / temperature + gumbel(seed, output index, token id).
//
// Filters measure a token by its gap, (best logit - logit) / temperature in fp32, and its weight,
// e^-gap in whole units of 2^-31 (WeightUnits): sums of weights are the same in any order, on a CPU
// and on a GPU (kernels/cuda/sample_whole.h). Where a filter is asked for, tokens with a gap of 21
// or more (8e-10 of the best one's probability) are out. top_k and top_p keep tokens by falling
// logit, typical_p by rising |gap - mean gap|; the last one kept is the first with which their
// weights reach the share. The logarithm of the softmax denominator is a sum of e^x in whole units
// of 2^-44.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "kernels/sampling/portable_math.h"
#include "worker/execution/cpu/penalties.h"
#include "worker/step/step_plan.h"

namespace nibble::execution {

inline constexpr float kGreedyBelow = 1e-5f;
inline constexpr int32_t kDraftsMax = 255;  // of one sequence and step

// What one row asks of the sampler. Pointers are borrowed for the step.
struct RowRequest {
  const step::SamplingParams* params = nullptr;
  const TokenCount* counts = nullptr;       // [vocab] where penalties are used, else nullptr
  const uint32_t* mask = nullptr;           // one bit per token id, 1 = allowed; or nullptr
  std::span<const int32_t> forbidden = {};  // stop ids before min_tokens
  std::span<const int32_t> drafts = {};     // output tokens assumed before this row
  uint64_t seed = 0;
  uint64_t output_index = 0;
  int32_t logprobs = -1;

  [[nodiscard]] bool greedy() const { return params->temperature < kGreedyBelow; }
};

// Whether top_k, typical_p, top_p or min_p leave tokens out.
[[nodiscard]] bool HasFilters(const step::SamplingParams& params, int32_t vocab_size);

// Whether a rank can find its best token among its own columns alone, without the whole row.
[[nodiscard]] bool WorksOnPartOfRow(const RowRequest& request, int32_t vocab_size);

// The best token of some columns. Larger score wins, then the lower id.
struct Candidate {
  double score = -std::numeric_limits<double>::infinity();
  int32_t token_id = -1;   // -1: none, every column is masked
  int32_t non_finite = 0;  // 1: a logit was NaN or +infinity, or has become it
};
// Takes `other` into `best`; the order of merging does not matter.
void Merge(const Candidate& other, Candidate* best);

// Applies penalties, bias and masks to the logits of columns [first_token, first_token + size).
void AdjustLogits(const RowRequest& request, int32_t first_token, std::span<float> logits);

// Whether a raw logit is NaN or +infinity.
[[nodiscard]] bool HasNonFinite(std::span<const float> logits);

// The best of adjusted logits, greedily or at the row's temperature.
[[nodiscard]] Candidate BestOf(const RowRequest& request, int32_t first_token,
                               std::span<const float> logits);

// Works on whole rows. Owns scratch memory for one row; one thread.
class RowSampler {
 public:
  explicit RowSampler(int32_t vocab_size);
  [[nodiscard]] static int64_t ScratchBytes(int32_t vocab_size);

  // Adjusts `logits` (raw, [vocab]) in place, filters and samples.
  [[nodiscard]] Candidate Sample(const RowRequest& request, std::span<float> logits);

  // ln of the softmax denominator of raw logits.
  [[nodiscard]] double LogSumExp(std::span<const float> logits) const;
  // The `count` most probable tokens of raw logits, best first.
  void TopLogprobs(std::span<const float> logits, double log_sum_exp, int32_t count,
                   step::TokenLogprob* top) const;

 private:
  struct Entry {
    float logit = 0;
    int32_t token_id = 0;
  };

  void Collect(std::span<const float> logits);
  void SortFirst(size_t count);
  [[nodiscard]] float Gap(float logit) const { return (max_logit_ - logit) * gap_scale_; }
  [[nodiscard]] uint64_t Weight(const Entry& entry) const {
    return sampling::WeightUnits(Gap(entry.logit));
  }
  [[nodiscard]] uint64_t TotalWeight() const;
  void KeepTopK(int32_t top_k);
  void KeepTypical(float typical_p);
  void KeepTopP(float top_p);
  void KeepMinP(float min_p);

  std::vector<Entry> entries_;  // what filters have left
  size_t sorted_ = 0;           // so many of them, the best, stand first in falling order
  float gap_scale_ = 1;         // 1 / temperature
  float max_logit_ = 0;
};

}  // namespace nibble::execution
