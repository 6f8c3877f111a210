#include "worker/execution/cpu/row_sampler.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "base/check.h"
#include "kernels/sampling/random.h"

namespace nibble::execution {
namespace {

constexpr float kMasked = -std::numeric_limits<float>::infinity();
constexpr float kOverflown = std::numeric_limits<float>::infinity();  // by an absurd penalty
constexpr Candidate kNotFinite{.non_finite = 1};
constexpr size_t kLanes = 16;  // independent maxima, so that the compiler can use vectors
constexpr size_t kBlock = 512;

// The largest of values [begin, end), or kMasked; ignores NaN.
float MaxOf(const float* values, size_t begin, size_t end) {
  std::array<float, kLanes> lanes;
  lanes.fill(kMasked);
  size_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = values[i + lane] > lanes[lane] ? values[i + lane] : lanes[lane];
    }
  }
  float max = kMasked;
  for (; i < end; ++i) max = values[i] > max ? values[i] : max;
  for (const float lane : lanes) max = lane > max ? lane : max;
  return max;
}

// Index of the first largest value; size() when all are masked.
size_t ArgMax(std::span<const float> values) {
  float max = kMasked;
  size_t block = values.size();
  for (size_t begin = 0; begin < values.size(); begin += kBlock) {
    const float here = MaxOf(values.data(), begin, std::min(begin + kBlock, values.size()));
    if (here > max) {
      max = here;
      block = begin;
    }
  }
  if (block == values.size()) return block;
  while (values[block] != max) ++block;
  return block;
}

double Score(float logit, double inverse_temperature, uint64_t stream, int32_t token_id) {
  return static_cast<double>(logit) * inverse_temperature +
         sampling::GumbelFromBits(sampling::UniformBits(stream, token_id));
}

// P(gumbel > d) = 1 - exp(-e^-d) <= e^-d. Uniform bits below bound[floor(d)] give a gumbel that is
// not above d, so that most tokens need no logarithm; the 1.001 outweighs all rounding.
constexpr size_t kBounds = 37;
const std::array<uint64_t, kBounds>& SkipBounds() {
  static const std::array<uint64_t, kBounds> bounds = [] {
    std::array<uint64_t, kBounds> made{};
    for (size_t d = 1; d < kBounds; ++d) {
      const double surely_below = 1.0 - 1.001 * sampling::PortableExp(-static_cast<double>(d));
      made[d] = static_cast<uint64_t>(surely_below * 0x1p52);
    }
    return made;
  }();
  return bounds;
}

// The largest logit * inverse_temperature + gumbel, exactly as if every token were scored.
Candidate SampleAll(const RowRequest& request, int32_t first_token, std::span<const float> logits,
                    size_t arg_max) {
  const std::array<uint64_t, kBounds>& bounds = SkipBounds();
  const uint64_t stream = sampling::OutputStream(request.seed, request.output_index);
  const double inverse_temperature = 1.0 / static_cast<double>(request.params->temperature);
  Candidate best;
  best.token_id = first_token + static_cast<int32_t>(arg_max);
  best.score = Score(logits[arg_max], inverse_temperature, stream, best.token_id);
  for (size_t i = 0; i < logits.size(); ++i) {
    const double gap = best.score - static_cast<double>(logits[i]) * inverse_temperature;
    if (gap > sampling::kGumbelMax) continue;  // also where the logit is masked
    const int32_t token_id = first_token + static_cast<int32_t>(i);
    if (gap >= 1 && sampling::UniformBits(stream, token_id) < bounds[static_cast<size_t>(gap)])
      continue;
    const double score = Score(logits[i], inverse_temperature, stream, token_id);
    if (score > best.score || (score == best.score && token_id < best.token_id)) {
      best.score = score;
      best.token_id = token_id;
    }
  }
  return best;
}

// Counts with the drafts before this row taken as output.
void AdjustDrafts(const RowRequest& request, int32_t first_token, std::span<const float> raw,
                  std::span<float> logits) {
  for (size_t i = 0; i < request.drafts.size(); ++i) {
    const int32_t token_id = request.drafts[i];
    const int32_t column = token_id - first_token;
    if (column < 0 || column >= static_cast<int32_t>(logits.size())) continue;
    const auto times = std::count(request.drafts.begin(), request.drafts.end(), token_id);
    const TokenCount count = request.counts[token_id];
    const auto outputs =
        std::min<int64_t>((count & kOutputMax) + times, static_cast<int64_t>(kOutputMax));
    const auto with_drafts = static_cast<TokenCount>((count & kInPrompt) | outputs);
    logits[static_cast<size_t>(column)] = Penalized(raw[i], with_drafts, *request.params);
  }
}

void ApplyPenalties(const RowRequest& request, int32_t first_token, std::span<float> logits) {
  std::array<float, kDraftsMax> raw{};
  CHECK(request.drafts.size() <= raw.size());
  for (size_t i = 0; i < request.drafts.size(); ++i) {
    const int32_t column = request.drafts[i] - first_token;
    if (column >= 0 && column < static_cast<int32_t>(logits.size())) {
      raw[i] = logits[static_cast<size_t>(column)];
    }
  }
  const TokenCount* counts = request.counts + first_token;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (counts[i] != 0) logits[i] = Penalized(logits[i], counts[i], *request.params);
  }
  AdjustDrafts(request, first_token, raw, logits);
}

// `share` of a sum of weights; one unit at least, so that a token is kept.
uint64_t ShareOfWeight(float share, uint64_t total) {
  const double part = static_cast<double>(share) * static_cast<double>(total);
  return std::max<uint64_t>(1, static_cast<uint64_t>(part));
}

}  // namespace

bool HasFilters(const step::SamplingParams& params, int32_t vocab_size) {
  return (params.top_k > 0 && params.top_k < vocab_size) || params.top_p < 1 ||
         params.typical_p < 1 || params.min_p > 0;
}

bool WorksOnPartOfRow(const RowRequest& request, int32_t vocab_size) {
  return request.logprobs < 0 && (request.greedy() || !HasFilters(*request.params, vocab_size));
}

void Merge(const Candidate& other, Candidate* best) {
  const int32_t non_finite = best->non_finite | other.non_finite;
  if (other.token_id >= 0 && (best->token_id < 0 || other.score > best->score ||
                              (other.score == best->score && other.token_id < best->token_id))) {
    *best = other;
  }
  best->non_finite = non_finite;
}

void AdjustLogits(const RowRequest& request, int32_t first_token, std::span<float> logits) {
  const auto size = static_cast<int32_t>(logits.size());
  const auto at = [&](int32_t token_id) -> float* {
    const int32_t column = token_id - first_token;
    return column >= 0 && column < size ? &logits[static_cast<size_t>(column)] : nullptr;
  };
  if (request.counts != nullptr) ApplyPenalties(request, first_token, logits);
  for (const step::LogitBias& bias : request.params->logit_bias) {
    if (float* logit = at(bias.token_id)) *logit += bias.bias;
  }
  for (const int32_t token_id : request.forbidden) {
    if (float* logit = at(token_id)) *logit = kMasked;
  }
  if (request.mask != nullptr) {
    for (int32_t i = 0; i < size; ++i) {
      const auto token_id = static_cast<uint32_t>(first_token + i);
      if ((request.mask[token_id / 32] >> (token_id % 32) & 1) == 0) {
        logits[static_cast<size_t>(i)] = kMasked;
      }
    }
  }
}

bool HasNonFinite(std::span<const float> logits) {
  std::array<int32_t, kLanes> lanes{};
  size_t i = 0;
  for (; i + kLanes <= logits.size(); i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] |= !(logits[i + lane] < std::numeric_limits<float>::infinity());
    }
  }
  int32_t any = 0;
  for (; i < logits.size(); ++i) any |= !(logits[i] < std::numeric_limits<float>::infinity());
  for (const int32_t lane : lanes) any |= lane;
  return any != 0;
}

Candidate BestOf(const RowRequest& request, int32_t first_token, std::span<const float> logits) {
  const size_t arg_max = ArgMax(logits);
  if (arg_max == logits.size()) return {};
  if (!request.greedy()) {
    if (logits[arg_max] == kOverflown) return kNotFinite;
    return SampleAll(request, first_token, logits, arg_max);
  }
  return {.score = static_cast<double>(logits[arg_max]),
          .token_id = first_token + static_cast<int32_t>(arg_max)};
}

RowSampler::RowSampler(int32_t vocab_size) { entries_.reserve(static_cast<size_t>(vocab_size)); }

int64_t RowSampler::ScratchBytes(int32_t vocab_size) {
  return vocab_size * static_cast<int64_t>(sizeof(Entry));
}

Candidate RowSampler::Sample(const RowRequest& request, std::span<float> logits) {
  Candidate best;
  best.non_finite = HasNonFinite(logits) ? 1 : 0;
  AdjustLogits(request, 0, logits);
  if (best.non_finite != 0) return best;
  const step::SamplingParams& params = *request.params;
  if (request.greedy() || !HasFilters(params, static_cast<int32_t>(logits.size()))) {
    return BestOf(request, 0, logits);
  }
  const size_t arg_max = ArgMax(logits);
  if (arg_max == logits.size()) return best;
  max_logit_ = logits[arg_max];
  if (max_logit_ == kOverflown) return kNotFinite;
  const double inverse_temperature = 1.0 / static_cast<double>(params.temperature);
  gap_scale_ = static_cast<float>(inverse_temperature);
  Collect(logits);
  if (params.top_k > 0) KeepTopK(params.top_k);
  if (params.typical_p < 1) KeepTypical(params.typical_p);
  if (params.top_p < 1) KeepTopP(params.top_p);
  if (params.min_p > 0) KeepMinP(params.min_p);
  const uint64_t stream = sampling::OutputStream(request.seed, request.output_index);
  for (const Entry& entry : entries_) {
    Merge({.score = Score(entry.logit, inverse_temperature, stream, entry.token_id),
           .token_id = entry.token_id},
          &best);
  }
  return best;
}

void RowSampler::Collect(std::span<const float> logits) {
  entries_.clear();
  sorted_ = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (Gap(logits[i]) < sampling::kWeightReach)
      entries_.push_back({logits[i], static_cast<int32_t>(i)});
  }
}

// Brings the best `count` entries, sorted, to the front.
void RowSampler::SortFirst(size_t count) {
  count = std::min(count, entries_.size());
  if (count <= sorted_) return;
  std::partial_sort(entries_.begin() + static_cast<std::ptrdiff_t>(sorted_),
                    entries_.begin() + static_cast<std::ptrdiff_t>(count), entries_.end(),
                    [](const Entry& a, const Entry& b) {
                      return a.logit > b.logit || (a.logit == b.logit && a.token_id < b.token_id);
                    });
  sorted_ = count;
}

uint64_t RowSampler::TotalWeight() const {
  uint64_t total = 0;
  for (const Entry& entry : entries_) total += Weight(entry);
  return total;
}

void RowSampler::KeepTopK(int32_t top_k) {
  const auto count = static_cast<size_t>(top_k);
  if (count >= entries_.size()) return;
  SortFirst(count);
  entries_.resize(count);
}

// Keeps the tokens whose information is nearest to the entropy, until they hold typical_p of the
// probability (Meister et al. 2022): information less entropy is the gap less its mean.
void RowSampler::KeepTypical(float typical_p) {
  const uint64_t total = TotalWeight();
  uint64_t gaps = 0;  // weighted
  for (const Entry& entry : entries_) {
    gaps += static_cast<uint64_t>(static_cast<double>(Weight(entry)) *
                                  static_cast<double>(Gap(entry.logit)));
  }
  const auto mean = static_cast<float>(static_cast<double>(gaps) / static_cast<double>(total));
  std::sort(entries_.begin(), entries_.end(), [&](const Entry& a, const Entry& b) {
    const float distance_a = std::abs(Gap(a.logit) - mean);
    const float distance_b = std::abs(Gap(b.logit) - mean);
    return distance_a < distance_b || (distance_a == distance_b && a.token_id < b.token_id);
  });
  const uint64_t target = ShareOfWeight(typical_p, total);
  uint64_t sum = 0;
  size_t kept = 0;
  while (sum < target) sum += Weight(entries_[kept++]);
  entries_.resize(kept);
  sorted_ = 0;
}

// Keeps the best tokens until they hold top_p of the probability.
void RowSampler::KeepTopP(float top_p) {
  const uint64_t target = ShareOfWeight(top_p, TotalWeight());
  uint64_t sum = 0;
  size_t kept = 0;
  while (sum < target) {
    if (kept >= sorted_) SortFirst(std::max<size_t>(64, sorted_ * 4));
    sum += Weight(entries_[kept++]);
  }
  entries_.resize(kept);
  sorted_ = std::min(sorted_, entries_.size());
}

void RowSampler::KeepMinP(float min_p) {
  uint64_t best = 0;
  for (const Entry& entry : entries_) best = std::max(best, Weight(entry));
  const auto least =
      static_cast<uint64_t>(std::ceil(static_cast<double>(min_p) * static_cast<double>(best)));
  std::erase_if(entries_, [&](const Entry& entry) { return Weight(entry) < least; });
}

double RowSampler::LogSumExp(std::span<const float> logits) const {
  const size_t arg_max = ArgMax(logits);
  const double max = arg_max < logits.size() ? static_cast<double>(logits[arg_max]) : 0.0;
  uint64_t sum = 0;
  for (const float logit : logits) {
    sum += static_cast<uint64_t>(sampling::PortableExp(static_cast<double>(logit) - max) * 0x1p44 +
                                 0.5);
  }
  return max + sampling::PortableLog(static_cast<double>(sum) * 0x1p-44);
}

void RowSampler::TopLogprobs(std::span<const float> logits, double log_sum_exp, int32_t count,
                             step::TokenLogprob* top) const {
  int32_t held = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (held == count && !(count > 0 && logits[i] > top[held - 1].logprob)) continue;
    int32_t at = held < count ? held++ : held - 1;
    for (; at > 0 && logits[i] > top[at - 1].logprob; --at) top[at] = top[at - 1];
    top[at] = {.token_id = static_cast<int32_t>(i), .logprob = logits[i]};
  }
  for (int32_t i = 0; i < held; ++i) {
    top[i].logprob = static_cast<float>(static_cast<double>(top[i].logprob) - log_sum_exp);
  }
}

}  // namespace nibble::execution
