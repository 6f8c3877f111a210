// The end of a step: final norm, head, exchange of logits between ranks, sampling.
//
// Each vocabulary column's logit is computed by one rank. Rows that only need their best token
// exchange (score, id); rows with filters or logprobs gather their logits. Every rank then holds
// the same bytes, runs the same sampler and comes to the same tokens.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/execution/cpu/rank_context.h"
#include "worker/execution/cpu/row_sampler.h"

namespace nibble::execution {

class SamplerStage {
 public:
  using LogitsObserver =
      std::function<void(int32_t slot, int32_t position, std::span<const float> logits)>;
  // Blocks until the late masks of the running step are there.
  using MaskWaiter = std::function<absl::StatusOr<const step::MaskBatch*>()>;

  SamplerStage(RankContext* context, std::vector<weights::Range> vocab_shares,
               MaskWaiter wait_for_masks);

  void set_observer(LogitsObserver observer) { observer_ = std::move(observer); }

  // Called by every thread when the residual stream is complete after the next barrier. False, on
  // every thread, when a collective failed.
  [[nodiscard]] bool Run(int32_t thread);

  // Thread 0, after Run: accepts tokens into the slots and fills the result's lists.
  void Finish(step::StepResult* result);

  [[nodiscard]] int64_t scratch_bytes() const;

 private:
  struct Outcome {
    Candidate best;
    float logprob = 0;
    std::array<step::TokenLogprob, step::kMaxLogprobs> top;
  };
  // Rows sampled together: those that need their whole row stand first.
  struct Chunk {
    std::vector<int32_t> order;  // indices into StepRows::sampled
    int32_t whole = 0;
    [[nodiscard]] int32_t size() const { return static_cast<int32_t>(order.size()); }
  };

  [[nodiscard]] RowRequest RequestOf(const SampledRow& row) const;
  void MakeChunk(int32_t begin, int32_t end);
  [[nodiscard]] bool RunChunk(int32_t thread);
  void NormRows(int32_t thread, MatrixInput* input);
  [[nodiscard]] bool WaitForMasks(int32_t thread);
  void FindBestOfColumns(int32_t thread);
  [[nodiscard]] absl::Status Exchange();
  [[nodiscard]] absl::Status ExchangeCandidates();
  [[nodiscard]] absl::Status GatherLogits();
  void SampleWholeRow(int32_t thread, int32_t place);
  // The raw logits of whole row `place` of the chunk, copied side by side.
  [[nodiscard]] std::span<float> AssembleRow(int32_t thread, int32_t place) const;
  [[nodiscard]] float RawLogit(int32_t place, int32_t token_id) const;
  [[nodiscard]] const float* LogitsOfRank(int32_t rank, int32_t place) const;
  void FinishSequence(int32_t sequence, const Outcome* outcomes, step::StepResult* result);

  RankContext* const context_;
  const std::vector<weights::Range> vocab_shares_;  // of every rank
  const MaskWaiter wait_for_masks_;
  LogitsObserver observer_;

  Chunk chunk_;
  std::vector<Candidate> partial_;    // [chunk rows, threads]
  std::vector<Candidate> local_;      // [chunk rows - whole]
  std::vector<Candidate> exchanged_;  // [ranks, chunk rows - whole]
  std::vector<RowSampler> samplers_;  // per thread
  std::vector<Outcome> outcomes_;     // per sampled row of the step
};

}  // namespace nibble::execution
