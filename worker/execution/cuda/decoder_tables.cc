// What the decoder does before steps: block tables and KV blocks.
#include "kernels/cuda/elementwise.h"
#include "worker/execution/cuda/cuda_decoder.h"
#include "worker/step/step_plan.h"

namespace nibble::execution {

absl::Status CudaDecoder::UpdateTables(const int32_t* pairs, int32_t count) {
  return CudaStatus(
      cuda::Scatter({.pairs = pairs, .count = count, .target = block_tables_}, {.stream = stream_}),
      "block tables");
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
