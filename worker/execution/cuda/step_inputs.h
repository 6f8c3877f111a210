// What a step sends to the device: laid out by the host in one piece of memory, copied at once.
//
// Follows the slots through the plans in launch order. What a later step needs and only the device
// knows is the sampled token itself, which the device feeds to itself; positions, block tables and
// the number of outputs follow from the plans.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "kernels/cuda/attention_plan.h"
#include "kernels/cuda/sample.h"
#include "worker/execution/cuda/whole_rows.h"
#include "worker/step/executor.h"
#include "worker/step/step_plan.h"

namespace nibble::execution {

struct StepShape {
  int32_t tokens = 0;
  int32_t tiles = 0;          // of attention, which become units
  int32_t prompt_tiles = 0;   // of attention
  int32_t rows = 0;           // sampled
  int32_t table_updates = 0;  // block table entries
  int32_t copies = 0;         // KV blocks
  WholeShape whole = {};      // of the rows that ask for more than their best token
};

// Where each part lies, in bytes from the start. The parts of tokens, tiles and rows lie the same
// way whatever the others' sizes, so that a graph may keep their addresses.
struct StepOffsets {
  int64_t token_ids = 0;     // int32 [tokens]; -1 - slot: the slot's last sampled token
  int64_t positions = 0;     // int32 [tokens]
  int64_t blocks = 0;        // int32 [tokens]: KV block of the position
  int64_t units = 0;         // AttentionUnit [UnitCapacity(tiles)], empty at the end
  int64_t sample_rows = 0;   // SampleRow [rows]
  int64_t row_tokens = 0;    // int32 [rows]: input row
  int64_t updates = 0;       // int32 [table_updates][2]: index into all block tables, block
  int64_t copies = 0;        // int32 [copies][2]: from, to
  int64_t prompt_tiles = 0;  // AttentionTile [prompt_tiles]
  // The lists of WholeRows.
  int64_t whole_rows = 0, biases = 0, ids = 0, mask_words = 0;
  int64_t histories = 0, history_tokens = 0, drafted = 0;
  int64_t bytes = 0;
};
[[nodiscard]] StepOffsets OffsetsOf(const StepShape& shape);
// Units that a step of so many tiles has room for, whatever the lengths of its sequences.
[[nodiscard]] int32_t UnitCapacity(int32_t tiles);

// A row whose logits are sampled.
struct OutputRow {
  int32_t sequence = 0;     // index into StepPlan::sequences
  int32_t draft = 0;        // how many drafts stand before it
  bool whole = false;       // asks for more than its best token
  int32_t logprob_row = 0;  // of those that want logprobs
};

class StepInputs {
 public:
  struct Model {
    int32_t heads = 0, kv_heads = 0, head_dim = 0;
    int32_t window = 0;  // the widest of the layers; 0 where one sees all positions
  };
  // One slot more than the plans know, and one block, serve rows that pad a batch.
  StepInputs(const step::ExecutorLimits& limits, const Model& model);

  // REQUIRES: a plan that PlanChecker accepted. INVALID_ARGUMENT: a list is longer than any step's
  // may be.
  [[nodiscard]] absl::Status Build(const step::StepPlan& plan);
  // Adds sequences of one token that nobody asked for until there are `tokens`.
  void Pad(int32_t tokens);

  [[nodiscard]] StepShape shape() const;
  void Write(const StepOffsets& offsets, std::byte* memory) const;

  [[nodiscard]] const std::vector<OutputRow>& rows() const { return rows_; }
  [[nodiscard]] const WholeRows& whole_rows() const { return whole_rows_; }
  // Every sequence has one token, which is sampled.
  [[nodiscard]] bool decode_only() const { return decode_only_; }
  // Positions that the longest sequence sees.
  [[nodiscard]] int32_t longest() const { return longest_; }

  // The outputs of a sequence with drafts are known when its step is waited for.
  void TakeOutputs(int32_t slot, int32_t count);

  [[nodiscard]] int32_t table_size() const { return table_size_; }
  // Bytes that no step's inputs exceed.
  [[nodiscard]] int64_t bytes_max() const;

 private:
  struct Slot {
    int64_t outputs = 0;
    int32_t last_of_history = 0;
    bool sampled = false;  // since it was opened
  };

  [[nodiscard]] absl::Status Open(const step::SlotSetup& setup);
  void AddBlocks(const step::StepPlan& plan, const step::SequenceStep& sequence);
  void AddTokens(const step::StepPlan& plan, const step::SequenceStep& sequence);
  void AddTiles(const step::SequenceStep& sequence, int32_t first_row);
  void AddRows(const step::StepPlan& plan, int32_t index);
  void PlanUnits();

  const step::ExecutorLimits limits_;
  const Model model_;
  const int32_t table_size_;
  std::vector<Slot> slots_;
  std::vector<int32_t> tables_;  // [slots + 1, table_size]
  WholeRows whole_rows_;

  // Of the step.
  std::vector<int32_t> token_ids_, positions_, blocks_, row_tokens_, updates_, copies_;
  std::vector<cuda::AttentionTile> tiles_, prompt_tiles_;
  std::vector<cuda::AttentionUnit> units_;
  std::vector<cuda::SampleRow> sample_rows_;
  std::vector<OutputRow> rows_;
  bool decode_only_ = false;
  int32_t longest_ = 0;
};

}  // namespace nibble::execution
