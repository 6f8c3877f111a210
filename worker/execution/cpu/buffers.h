// The buffers of one rank that every layer and step uses again. Sizes follow
// weights::PlanActivations, so that a plan made from headers is what is allocated here.
#pragma once

#include <cstdint>
#include <vector>

#include "worker/execution/cpu/memory.h"
#include "worker/execution/cpu/model_shard.h"
#include "worker/weights/activation_plan.h"
#include "worker/weights/memory_plan.h"

namespace nibble::execution {

using weights::kPrivateTokens;

struct Buffers {
  // T = max_step_tokens.
  float* residual = nullptr;   // [T, hidden]
  float* normed = nullptr;     // [T, hidden]
  float* qkv = nullptr;        // [T, qkv rows]
  float* attention = nullptr;  // [T, heads * head_dim]
  float* gate_up = nullptr;    // [T, 2 * ffn]
  float* mlp = nullptr;        // [T, ffn]
  float* projected = nullptr;  // [T, hidden]: a partial sum of this rank

  // Rows converted for a matrix: `columns` and groups of at least 32.
  struct Converted {
    int8_t* values = nullptr;  // [rows, terms, columns]; fast numerics only
    float* scales = nullptr;   // [rows, groups]; exact numerics: sums of the groups
    int32_t* sums = nullptr;   // [rows, groups]; fast numerics only
    float* mlp = nullptr;      // [rows, ffn]
  };
  Converted shared;                   // [T]; mlp is the one above
  std::vector<Converted> per_thread;  // [kPrivateTokens]

  // Sampling: at most `sample_rows` at a time.
  int32_t sample_rows = 0;
  int32_t logits_stride = 0;      // the largest rank's share of the vocabulary
  float* logits = nullptr;        // [sample_rows, logits_stride]
  float* gathered = nullptr;      // [ranks, sample_rows, logits_stride]; several ranks only
  std::vector<float*> whole_row;  // per thread [vocab]
};

struct BufferOptions {
  weights::MemoryOptions memory;
  int32_t threads = 1;
  int32_t vocab_share_max = 0;
};

[[nodiscard]] Buffers AllocateBuffers(const ModelShard& model, const BufferOptions& options,
                                      Arena* activations, Arena* workspace);

}  // namespace nibble::execution
