#include "worker/weights/shard.h"

#include <algorithm>

#include "base/check.h"
#include "base/status.h"
#include "worker/model/message.h"

namespace nibble::weights {
namespace {

using model::Message;

// Part `index` of `count` things shared out over `parts`; the first parts are the larger ones.
Range Part(int32_t count, int32_t parts, int32_t index) {
  const int32_t small = count / parts;
  const int32_t larger = count % parts;
  const int32_t begin = index * small + std::min(index, larger);
  return {begin, begin + small + (index < larger ? 1 : 0)};
}

Range Scaled(Range range, int32_t unit, int32_t end) {
  return {std::min(range.begin * unit, end), std::min(range.end * unit, end)};
}

void ShareHeads(const model::ModelSpec& spec, int32_t rank_count, RankShare* share) {
  const int32_t queries = spec.head_count / spec.kv_head_count;  // per KV head
  if (rank_count <= spec.kv_head_count) {
    share->kv_heads = Part(spec.kv_head_count, rank_count, share->rank);
    share->heads = {share->kv_heads.begin * queries, share->kv_heads.end * queries};
    return;
  }
  for (int32_t kv = 0; kv < spec.kv_head_count; ++kv) {
    const Range ranks = Part(rank_count, spec.kv_head_count, kv);
    if (share->rank >= ranks.end) continue;
    const Range part = Part(queries, ranks.count(), share->rank - ranks.begin);
    share->kv_heads = {kv, kv + 1};
    share->heads = {kv * queries + part.begin, kv * queries + part.end};
    return;
  }
}

}  // namespace

absl::StatusOr<std::vector<RankShare>> ComputeShares(const model::ModelSpec& spec,
                                                     int32_t rank_count, int32_t ffn_unit) {
  if (rank_count < 1 || rank_count > spec.head_count) {
    return absl::InvalidArgumentError(Message("tensor-parallel degree is ", rank_count,
                                              "; allowed: 1 … ", spec.head_count,
                                              " (the query heads)"));
  }
  CHECK(ffn_unit > 0 && spec.ffn_size % ffn_unit == 0);
  const int32_t ffn_units = spec.ffn_size / ffn_unit;
  const int32_t vocab_units = (spec.vocab_size + kVocabUnit - 1) / kVocabUnit;
  if (ffn_units < rank_count || vocab_units < rank_count) {
    return absl::InvalidArgumentError(
        Message("tensor-parallel degree is ", rank_count, "; allowed: at most ",
                std::min(ffn_units, vocab_units), " (intermediate_size in units of ", ffn_unit,
                ", vocab_size in units of ", kVocabUnit, ")"));
  }
  std::vector<RankShare> shares(rank_count);
  for (int32_t rank = 0; rank < rank_count; ++rank) {
    RankShare& share = shares[rank];
    share.rank = rank;
    share.rank_count = rank_count;
    ShareHeads(spec, rank_count, &share);
    share.ffn = Scaled(Part(ffn_units, rank_count, rank), ffn_unit, spec.ffn_size);
    share.vocab = Scaled(Part(vocab_units, rank_count, rank), kVocabUnit, spec.vocab_size);
    CHECK(share.heads.count() > 0 && share.kv_heads.count() > 0);
  }
  return shares;
}

}  // namespace nibble::weights
