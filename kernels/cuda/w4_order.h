// Activations in the order of kernels/layout/gpu_x.h, for the products of w4_wgmma.h. All are
// graph-capturable; pointers are 16-byte aligned, device memory and borrowed.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/element.h"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/peer_exchange.h"
#include "kernels/layout/gpu_x.h"

namespace nibble::cuda {

struct OrderParams {
  const Real16* x = nullptr;  // [tokens, columns]
  int32_t tokens = 0;
  int32_t columns = 0;        // a multiple of 8
  int32_t group = 128;        // of the weights; 0 = dense
  Real16* ordered = nullptr;  // GpuOrderedCount
};
[[nodiscard]] cudaError_t OrderActivations(const OrderParams& params, const LaunchOptions& options);

// Embed (elementwise.h) of at most 16 tokens of fp16, which leaves what the first norm's product
// takes in fixed point: embed.next.x, with a part of the sums of squares for every slab. The scale
// that is written is 1. hidden is a multiple of 8.
struct FixedEmbedParams {
  EmbedParams embed;
  float* scales = nullptr;  // GpuFixedScaleCount
};
[[nodiscard]] cudaError_t FixedEmbed(const FixedEmbedParams& params, const LaunchOptions& options);

// Parts of sums that a product may leave (w4_wgmma.h), and of how many tokens.
inline constexpr int32_t kWgmmaPartsMax = 8;
inline constexpr int32_t kWgmmaPartsTokens = 64;

// RmsNorm (elementwise.h) whose results are left in order. It may add up first what the product
// before has left in parts (w4_wgmma.h).
struct OrderedNormParams {
  float* residual = nullptr;       // [any, hidden]; changed only where something is added
  const int32_t* rows = nullptr;   // [tokens], or nullptr: every row in order
  const Real16* weight = nullptr;  // [hidden]
  int32_t tokens = 0;
  int32_t hidden = 0;  // a multiple of 8
  float epsilon = 0;
  int32_t group = 128;        // of the weights that follow; 0 = dense
  Real16* ordered = nullptr;  // GpuOrderedCount
  // [part_count][tokens, hidden], added to the residual in this order; then rows must be nullptr.
  const float* parts = nullptr;
  int32_t part_count = 0;
  // In the place of parts: [tokens, hidden], added to the residual; then rows must be nullptr.
  const Real16* partial = nullptr;
  float* inverse_rms_out = nullptr;  // [tokens], or nullptr
  // With parts, ranks != 0: what is added is the sum over ranks of their parts' sums, each rounded
  // to the element type. Every rank launches the same; all its blocks, one a token, must come to
  // run at the same time. Words are NormExchangeWords(tokens, hidden) at least.
  PeerExchange exchange = {};
};
[[nodiscard]] cudaError_t OrderedNorm(const OrderedNormParams& params,
                                      const LaunchOptions& options);

}  // namespace nibble::cuda
