// Which part of every matrix a rank holds.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/model/model_spec.h"

namespace nibble::weights {

// Half-open ranges over the whole model.
struct Range {
  int32_t begin = 0;
  int32_t end = 0;
  [[nodiscard]] int32_t count() const { return end - begin; }
};

// Up to kv_head_count ranks: whole KV heads with their queries, shares may be uneven. More ranks:
// they are shared out over KV heads (±1), each head's queries split among its ranks; no rank holds
// parts of two KV heads. FFN columns split at multiples of `ffn_unit` (the group, or what divides
// it), vocabulary at multiples of 16.
struct RankShare {
  int32_t rank = 0;
  int32_t rank_count = 1;
  Range heads;     // query heads
  Range kv_heads;  // shared with other ranks where ranks > KV heads
  Range ffn;
  Range vocab;
};

inline constexpr int32_t kVocabUnit = 16;

// INVALID_ARGUMENT when rank_count is not in 1 … head_count, or more than there are units of FFN
// columns or of vocabulary. REQUIRES: ffn_unit divides ffn_size.
[[nodiscard]] absl::StatusOr<std::vector<RankShare>> ComputeShares(const model::ModelSpec& spec,
                                                                   int32_t rank_count,
                                                                   int32_t ffn_unit);

}  // namespace nibble::weights
