// What the decoder does where several ranks hold parts of the model: partial results of o and down
// are summed, and the shares of the vocabulary joined.
#include <algorithm>
#include <array>

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

int64_t CudaDecoder::ExchangedBytes(const StepView& step) const {
  const model::ModelSpec& spec = model_.spec();
  const auto layer_bytes = [&](int32_t tokens) {
    const int64_t value_bytes = LeavesParts(tokens) || tokens > kFloatTokens ? 2 : 4;
    return int64_t{2} * tokens * spec.hidden_size * value_bytes;
  };
  return (spec.layer_count - 1) * layer_bytes(step.tokens) +
         layer_bytes(KeepsRows(step) ? step.rows : step.tokens) +
         int64_t{step.rows} * model_.share().vocab.count() * 4;
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

bool CudaDecoder::SharesOut(const StepView& step) const {
  const cuda::PeerSlices* slices = Slices();
  if (slices == nullptr || !KeepsRows(step) || step.tokens > slices->max_tokens) return false;
  const DeviceLayer& layer = model_.layers()[0];
  return std::ranges::all_of(std::array{&layer.o, &layer.down}, [&](const DeviceMatrix* matrix) {
    return matrix->rows % 8 == 0 &&
           cuda::PromptTilesFit(
               {.rows = matrix->rows, .group = matrix->group, .tokens = step.tokens},
               multiprocessors_);
  });
}

absl::Status CudaDecoder::ShareOut(const Product& product) {
  Product part = product;
  part.output = cuda::DecodeOutput::kHalf;
  part.in_slices = true;
  shared_.waits = true;
  return Multiply(part);
}

void CudaDecoder::ToSlices(int32_t tokens, cuda::WgmmaInput* input) const {
  const cuda::PeerSlices& slices = *Slices();
  const cuda::PeerExchange& exchange = *Exchange();
  const int64_t part =
      int64_t{cuda::SliceTokens(slices.max_tokens, exchange.ranks)} * model_.spec().hidden_size;
  input->slice_tokens = cuda::SliceTokens(tokens, exchange.ranks);
  for (int32_t owner = 0; owner < exchange.ranks; ++owner) {
    input->slices[owner] = slices.parts[owner] + exchange.rank * part;
  }
}

absl::Status CudaDecoder::NormOfSlices(const cuda::Real16* weight, int32_t tokens,
                                       const DeviceMatrix& next) {
  constexpr int32_t kBlocksOfMultiprocessor = 2;
  const bool is_last = &next == &model_.layers().back().qkv;
  shared_.waits = false;
  shared_.normed = true;
  scale_ = 0;
  RETURN_IF_ERROR(CudaStatus(cuda::SliceNorm({.norm = {.residual = residual_,
                                                       .weight = weight,
                                                       .tokens = tokens,
                                                       .hidden = model_.spec().hidden_size,
                                                       .epsilon = model_.spec().norm_epsilon,
                                                       .group = next.group,
                                                       .exchange = *Exchange()},
                                              .slices = *Slices(),
                                              .number = ++slice_sums_,
                                              .kept_rows = is_last ? shared_.kept_rows : nullptr,
                                              .kept_count = is_last ? shared_.kept_count : 0},
                                             kBlocksOfMultiprocessor * multiprocessors_, Launch()),
                             "sum over ranks and norm"));
  return Timed("sum over ranks and norm");
}

absl::Status CudaDecoder::AddOverRanks(const Product& product) {
  if (shared_.on) return ShareOut(product);
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
