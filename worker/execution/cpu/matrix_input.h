// Makes fp32 rows ready as the input of a matrix: as they are, with group sums, or as int8 groups.
#pragma once

#include <cstdint>

#include "kernels/cpu/kernels.h"
#include "worker/execution/cpu/buffers.h"
#include "worker/execution/cpu/packed_matrix.h"
#include "worker/execution/cpu/thread_team.h"

namespace nibble::execution {

// Few tokens: every thread converts all of them into memory of its own, without a barrier. Many:
// each converts its share, then all meet.
class InputConverter {
 public:
  InputConverter(const cpu::Kernels* kernels, ThreadTeam* team, Buffers* buffers)
      : kernels_(kernels), team_(team), buffers_(buffers) {}

  // The tokens that `thread` makes ready; whoever computes the rows just before computes these.
  [[nodiscard]] cpu::BlockRange TokensOf(int32_t thread, int32_t tokens) const {
    if (tokens <= kPrivateTokens) return {0, tokens};
    return ShareOf(tokens, thread, team_->threads());
  }
  // Where `thread` puts the MLP's hidden rows of its tokens.
  [[nodiscard]] float* MlpRows(int32_t thread, int32_t tokens) const {
    return Target(thread, tokens).mlp;
  }

  enum class Rows { kReady, kOwnTokensOnly };
  // Called by every thread. `state`: whether all of `rows` are there for this thread already, or
  // only those of its TokensOf.
  [[nodiscard]] MatrixInput Convert(int32_t thread, InputForm form, cpu::FloatRows rows,
                                    Rows state) const;

 private:
  [[nodiscard]] const Buffers::Converted& Target(int32_t thread, int32_t tokens) const {
    return tokens <= kPrivateTokens ? buffers_->per_thread[static_cast<size_t>(thread)]
                                    : buffers_->shared;
  }

  const cpu::Kernels* const kernels_;
  ThreadTeam* const team_;
  Buffers* const buffers_;
};

}  // namespace nibble::execution
