// What the decoder does around steps: block tables, KV blocks, rows that ask for more than their
// best token.
#include "kernels/cuda/elementwise.h"
#include "worker/execution/cuda/cuda_decoder.h"
#include "worker/step/step_plan.h"

namespace nibble::execution {

absl::Status CudaDecoder::UpdateTables(const int32_t* pairs, int32_t count) {
  return CudaStatus(
      cuda::Scatter({.pairs = pairs, .count = count, .target = block_tables_}, {.stream = stream_}),
      "block tables");
}

absl::Status CudaDecoder::CountHistories(const cuda::HistoryParams& params) {
  return CudaStatus(cuda::CountHistories(params, {.stream = stream_}), "counting tokens");
}

absl::Status CudaDecoder::SampleWhole(cuda::WholeParams params) {
  params.logits = logits_;
  params.last_tokens = last_tokens_;
  RETURN_IF_ERROR(
      CudaStatus(cuda::SampleWhole(params, hopper_, {.stream = stream_}), "sampling whole rows"));
  return Timed("sampling of whole rows", int64_t{params.count} * params.vocab_size * 4);
}

absl::Status CudaDecoder::AcceptDrafts(cuda::DraftParams params) {
  params.last_tokens = last_tokens_;
  return CudaStatus(cuda::AcceptDrafts(params, {.stream = stream_}), "accepting drafts");
}

absl::Status CudaDecoder::CopyBlocks(const int32_t* from_to, int32_t count) {
  const int32_t kv_columns = model_.share().kv_heads.count() * model_.spec().head_dim;
  for (int32_t i = 0; i < count; ++i) {
    RETURN_IF_ERROR(
        CudaStatus(cuda::CopyBlocks({.cache = kv_,
                                     .block_bytes = int64_t{step::kBlockTokens} * kv_columns * 2,
                                     .part_bytes = kv_part_bytes_,
                                     .parts = 2 * model_.spec().layer_count,
                                     .from_to = from_to + 2 * i,
                                     .copies = 1},
                                    {.stream = stream_}),
                   "copying KV blocks"));
  }
  return absl::OkStatus();
}

}  // namespace nibble::execution
