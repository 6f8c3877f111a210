// Which of a kernel's two forms runs: that of the element type which the caller names.
#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_portable.h"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/nccl_results.h"
#include "kernels/cuda/w4_batch.h"
#include "kernels/cuda/w4_decode.h"
#include "kernels/cuda/w4_order.h"
#include "kernels/cuda/w4_wgmma.h"

namespace nibble::cuda {

// `chosen` says of the parameters which element type is meant.
#define NIBBLE_BY_ELEMENT(name, parameters, arguments, chosen)                      \
  namespace f16 {                                                                   \
  cudaError_t name parameters;                                                      \
  }                                                                                 \
  namespace bf16 {                                                                  \
  cudaError_t name parameters;                                                      \
  }                                                                                 \
  cudaError_t name parameters {                                                     \
    return (chosen) == Element::kHalf ? f16::name arguments : bf16::name arguments; \
  }
#define NIBBLE_OPERATION(name, params)                                                   \
  NIBBLE_BY_ELEMENT(name, (const params& p, const LaunchOptions& options), (p, options), \
                    options.element)

NIBBLE_OPERATION(Embed, EmbedParams)
NIBBLE_OPERATION(RmsNorm, RmsNormParams)
NIBBLE_OPERATION(SiluMul, SiluMulParams)
NIBBLE_OPERATION(RopeAndStore, RopeParams)
NIBBLE_OPERATION(AttentionPortable, AttentionParams)
NIBBLE_OPERATION(Attention, AttentionParams)
NIBBLE_OPERATION(W4Batch, W4BatchParams)
NIBBLE_OPERATION(OrderActivations, OrderParams)
NIBBLE_OPERATION(FixedEmbed, FixedEmbedParams)
NIBBLE_OPERATION(OrderedNorm, OrderedNormParams)
NIBBLE_OPERATION(AddPartial, AddPartialParams)
NIBBLE_BY_ELEMENT(W4Decode, (const W4DecodeParams& p, int32_t multiprocessors, cudaStream_t stream),
                  (p, multiprocessors, stream), p.element)
NIBBLE_BY_ELEMENT(W4Wgmma,
                  (const W4BatchParams& p, const WgmmaInput& input, int32_t multiprocessors,
                   const LaunchOptions& options),
                  (p, input, multiprocessors, options), options.element)

#undef NIBBLE_OPERATION
#undef NIBBLE_BY_ELEMENT

}  // namespace nibble::cuda
