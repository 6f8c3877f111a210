// What the executor keeps of every sequence between steps, and the rows of one step.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "worker/execution/cpu/memory.h"
#include "worker/execution/cpu/penalties.h"
#include "worker/step/executor.h"
#include "worker/step/step_plan.h"

namespace nibble::execution {

struct Slot {
  uint64_t seed = 0;
  step::SamplingParams params;
  std::vector<int32_t> stop_ids;
  int32_t min_tokens = 0;
  int32_t outputs = 0;     // tokens generated so far
  int32_t last_token = 0;  // sampled last
  bool penalized = false;
};

// Owned by the driver thread; helpers read between barriers.
class SlotTable {
 public:
  explicit SlotTable(const step::ExecutorLimits& limits);

  void Open(const step::SlotSetup& setup);
  // Takes a sampled token as the next output.
  void AddOutput(int32_t slot, int32_t token_id);
  void SetBlocks(int32_t slot, int32_t index, std::span<const int32_t> blocks);

  [[nodiscard]] const Slot& slot(int32_t slot) const { return slots_[static_cast<size_t>(slot)]; }
  [[nodiscard]] const int32_t* block_table(int32_t slot) const {
    return block_tables_.as<int32_t>() + static_cast<int64_t>(slot) * table_size_;
  }
  [[nodiscard]] const PenaltyCounts& penalties() const { return penalties_; }

  [[nodiscard]] int64_t bytes() const { return block_tables_.bytes() + penalties_bytes_; }

 private:
  const int32_t table_size_;  // blocks of max_context positions
  std::vector<Slot> slots_;
  MappedMemory block_tables_;  // [slots, table_size] int32
  PenaltyCounts penalties_;
  const int64_t penalties_bytes_;
};

// An input row of a step.
struct InputRow {
  int32_t token_id = 0;
  int32_t position = 0;
  int32_t block = 0;  // of the KV cache, for this position
};

// A run of tokens of one sequence and a range of its heads: one piece of attention work.
struct AttentionPiece {
  int32_t sequence = 0;                    // index into StepPlan::sequences
  int32_t first_row = 0;                   // the sequence's first input row
  int32_t token_begin = 0, token_end = 0;  // within the sequence
  int32_t head_begin = 0, head_end = 0;
};

// A row whose logits are sampled.
struct SampledRow {
  int32_t row = 0;       // input row
  int32_t sequence = 0;  // index into StepPlan::sequences
  int32_t draft = 0;     // how many drafts stand before it
  const uint32_t* mask = nullptr;
  bool late_mask = false;
};

// Laid out by the driver before the threads start; read by all of them.
struct StepRows {
  std::vector<InputRow> inputs;
  std::vector<AttentionPiece> pieces;
  std::vector<SampledRow> sampled;
  int32_t late_rows = 0;

  struct Layout {
    int32_t heads = 0, kv_heads = 0, threads = 1;
  };
  // Reserves for the largest step, so that Build never allocates.
  void Reserve(const step::ExecutorLimits& limits, const Layout& layout);
  void Build(const step::StepPlan& plan, const SlotTable& slots, const Layout& layout);

 private:
  void AddPieces(const step::StepPlan& plan, const Layout& layout);
};

}  // namespace nibble::execution
