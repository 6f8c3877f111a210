// What the decoder does where several ranks hold parts of the model: partial results of o and down
// are summed, and the shares of the vocabulary joined.
#include <algorithm>

#include "kernels/cuda/nccl_results.h"
#include "worker/execution/cuda/cuda_decoder.h"

namespace nibble::execution {
namespace {

constexpr int32_t kFloatTokens = 64;  // NCCL's partial results of more tokens are fp16

int32_t LargestShare(const std::vector<weights::Range>& shares) {
  int32_t largest = 0;
  for (const weights::Range& share : shares) largest = std::max(largest, share.count());
  return largest;
}

}  // namespace

int64_t CudaDecoder::ExchangedBytes(int32_t tokens, int32_t rows) const {
  const model::ModelSpec& spec = model_.spec();
  const int64_t value_bytes = LeavesParts(tokens) || tokens > kFloatTokens ? 2 : 4;
  return int64_t{2} * spec.layer_count * tokens * spec.hidden_size * value_bytes +
         int64_t{rows} * model_.share().vocab.count() * 4;
}

absl::Status CudaDecoder::AllocateForGroup() {
  if (!parallel()) return absl::OkStatus();
  const int64_t hidden = model_.spec().hidden_size;
  const int64_t tokens = options_.max_step_tokens;
  const int64_t floats = std::max(std::min<int64_t>(tokens, kFloatTokens), (tokens + 1) / 2);
  ASSIGN_OR_RETURN(partial_, arena_.Allocate<float>(floats * hidden));
  const int64_t padded = int64_t{options_.sample_rows} * LargestShare(options_.vocab_shares);
  const auto ranks = static_cast<int64_t>(options_.vocab_shares.size());
  ASSIGN_OR_RETURN(own_logits_, arena_.Allocate<float>(padded));
  ASSIGN_OR_RETURN(gathered_logits_, arena_.Allocate<float>(ranks * padded));
  return absl::OkStatus();
}

absl::Status CudaDecoder::AddOverRanks(const Product& product) {
  const int32_t hidden = product.matrix->rows;
  const int64_t count = int64_t{product.tokens} * hidden;
  const bool short_sums = product.tokens > kFloatTokens;
  auto* reals = reinterpret_cast<cuda::Real16*>(partial_);
  const bool bf16 = model_.element() == cuda::Element::kBfloat16;
  Product part = product;
  part.output = short_sums ? cuda::DecodeOutput::kHalf : cuda::DecodeOutput::kFloat;
  part.y_half = short_sums ? reals : nullptr;
  part.y_float = short_sums ? nullptr : partial_;
  RETURN_IF_ERROR(Multiply(part));
  const NcclType type = !short_sums ? kNcclFloat : bf16 ? kNcclBfloat16 : kNcclHalf;
  RETURN_IF_ERROR(options_.group->AllReduce(partial_, count, type, stream_));
  partial_waits_ =
      short_sums && product.norm_follows && options_.fusion && OrderedInput(product.tokens);
  if (partial_waits_) return Timed("sum over ranks");
  // Behind NCCL's kernel, which lets nobody start early.
  RETURN_IF_ERROR(CudaStatus(cuda::AddPartial({.residual = residual_,
                                               .partial_float = short_sums ? nullptr : partial_,
                                               .partial_half = short_sums ? reals : nullptr,
                                               .count = count},
                                              {.stream = stream_, .element = model_.element()}),
                             "adding to the residual stream"));
  return Timed("sum over ranks");
}

absl::Status CudaDecoder::JoinLogits(int32_t rows) {
  const std::vector<weights::Range>& shares = options_.vocab_shares;
  const int64_t padded = int64_t{rows} * LargestShare(shares);
  RETURN_IF_ERROR(options_.group->AllGather(own_logits_, gathered_logits_, padded, stream_));
  cuda::JoinLogitsParams params{.gathered = gathered_logits_,
                                .rank_stride = padded,
                                .ranks = static_cast<int32_t>(shares.size()),
                                .rows = rows,
                                .logits = logits_};
  for (size_t rank = 0; rank < shares.size(); ++rank) params.begin[rank] = shares[rank].begin;
  params.begin[shares.size()] = model_.spec().vocab_size;
  RETURN_IF_ERROR(CudaStatus(cuda::JoinLogits(params, {.stream = stream_}), "joining logits"));
  return Timed("logits of ranks");
}

}  // namespace nibble::execution
