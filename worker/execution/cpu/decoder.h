// One step of the model on one rank: what every compute thread runs.
#pragma once

#include <cstdint>
#include <functional>

#include "worker/execution/cpu/attention_block.h"
#include "worker/execution/cpu/rank_context.h"
#include "worker/execution/cpu/sampler_stage.h"

namespace nibble::execution {

class Decoder final : public ThreadTeam::Task {
 public:
  // `stamp` is called by thread 0 as layers pass; may be empty.
  Decoder(RankContext* context, SamplerStage* sampler, std::function<void()> stamp)
      : context_(context), attention_(context), sampler_(sampler), stamp_(std::move(stamp)) {}

  // Embedding, layers, head and sampler of the step in the context. An error is in its status.
  void RunThread(int32_t thread) override;

  // When thread 0 reached the sampler.
  [[nodiscard]] Deadline sampling_began() const { return sampling_began_; }

 private:
  void CopyBlocks(int32_t thread);
  [[nodiscard]] bool Embed(int32_t thread);
  [[nodiscard]] bool RunLayers(int32_t thread);

  RankContext* const context_;
  AttentionBlock attention_;
  SamplerStage* const sampler_;
  const std::function<void()> stamp_;
  Deadline sampling_began_;
};

}  // namespace nibble::execution
