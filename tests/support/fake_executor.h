// An executor without a model: token i of a sequence with seed s is FakeToken(s, i), so whoever
// reads a stream can verify every token of it.
//
// It holds the scheduler to the contract of the narrow waist. Each of these fails the step with
// INTERNAL and a sentence that says what happened:
//   - a slot is used unopened, opened twice, closed while closed;
//   - a position is fed out of order, with another token than the sequence has there, or without a
//     block in the slot's table;
//   - a block that an open slot has in its table is written to for another one, or gets a new owner
//     while a step that may still touch it for an old one has not been waited for;
//   - a slot begins behind position 0 without whole blocks that hold its first tokens, or with one
//     whose contents come from a step that has not been waited for;
//   - what the blocks of a sequence hold is not what belongs there (each position keeps a canary of
//     all tokens up to it);
//   - the history of a reopened slot is not what the sequence generated;
//   - a step exceeds the limits, or a third one is launched.
//
// Time: a step takes step_base + step_per_token × tokens after the one before it. `sleep_until`
// lets that time pass (a simulation moves its clock there, a fake worker sleeps); without it steps
// take none.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "base/clock.h"
#include "worker/step/executor.h"

namespace nibble::testing {

// Output token `index` (from 0) of a sequence with `seed`: splitmix64 of both, modulo vocab_size.
[[nodiscard]] int32_t FakeToken(uint64_t seed, int32_t index, int32_t vocab_size);

// The same, with the rule for stop ids: before `min_tokens` outputs none of them is sampled, the
// next larger id that is no stop id is (wrapping at vocab_size).
[[nodiscard]] int32_t FakeToken(uint64_t seed, int32_t index, int32_t vocab_size,
                                std::span<const int32_t> stop_ids, int32_t min_tokens);

// The log-probability of that token, and of alternative `rank` of it (0 is the token itself).
// Alternative r has the id (token + r) modulo vocab_size.
[[nodiscard]] float FakeLogprob(uint64_t seed, int32_t index, int32_t rank);

struct FakeExecutorOptions {
  step::ExecutorLimits limits = {.vocab_size = 1000,
                                 .max_context = 2048,
                                 .max_slots = 64,
                                 .max_step_tokens = 512,
                                 .kv_blocks = 4096};
  Duration step_base{};
  Duration step_per_token{};
  const Clock* clock = nullptr;  // REQUIRED where steps take time
  std::function<void(Deadline)> sleep_until = {};
  // Looks at every earlier position of a row; off, at the first, the last and one more.
  bool check_whole_history = true;
};

// What to break, and when. Step ids are those of the plans; 0 is never.
struct FakeFaults {
  uint64_t launch_error_at = 0;  // Launch says INTERNAL
  uint64_t wait_error_at = 0;    // Wait says INTERNAL
  uint64_t hang_at = 0;          // Wait says DEADLINE_EXCEEDED
  // Rows of which slots are not finite in a step.
  std::function<bool(uint64_t step_id, int32_t slot)> non_finite = {};
};

// One thread, as for every executor.
class FakeExecutor final : public step::Executor {
 public:
  explicit FakeExecutor(FakeExecutorOptions options, FakeFaults faults = {});

  [[nodiscard]] absl::Status Launch(const step::StepPlan& plan) override;
  [[nodiscard]] absl::Status ProvideMasks(const step::MaskBatch& masks) override;
  [[nodiscard]] absl::Status Wait(Deadline deadline, step::StepResult* result) override;
  [[nodiscard]] const step::ExecutorLimits& limits() const override { return options_.limits; }

  // The first broken rule, or OK.
  [[nodiscard]] const absl::Status& violation() const { return violation_; }
  [[nodiscard]] int32_t open_slots() const;
  [[nodiscard]] uint64_t tokens_fed() const { return tokens_fed_; }
  [[nodiscard]] uint64_t rows_sampled() const { return rows_sampled_; }

 private:
  struct Slot {
    bool open = false;
    uint64_t seed = 0;
    int32_t prompt_count = 0;
    int32_t min_tokens = 0;
    std::vector<int32_t> stop_ids;
    std::vector<int32_t> tokens;     // history, then what it has sampled
    std::vector<uint64_t> canaries;  // [token]
    int32_t fed = 0;
    uint64_t last_launch = 0;  // the last step with a row of it, counted by launches
    std::vector<int32_t> table;
  };
  struct Block {
    int32_t holders = 0;       // open slots that have it in their tables
    int32_t writer = -1;       // the slot that it was new for, while that is open
    uint64_t last_launch = 0;  // of those that had it, when they lost it
    uint64_t last_write = 0;   // launch that wrote to it last
    std::array<uint64_t, step::kBlockTokens> canaries{};
  };
  struct Pending {
    Deadline done{};
    step::StepResult result;
  };

  absl::Status Apply(const step::StepPlan& plan, Pending* pending);
  absl::Status Close(int32_t slot_index);
  absl::Status Open(const step::SlotSetup& setup);
  absl::Status Feed(const step::StepPlan& plan, const step::SequenceStep& row);
  absl::Status TakeBlocks(const step::StepPlan& plan, const step::SequenceStep& row);
  absl::Status TakeNew(int32_t id, int32_t slot_index);
  absl::Status TakeCached(int32_t id, int32_t slot_index);
  absl::Status CheckCanaries(int32_t slot_index, int32_t first, int32_t last) const;
  absl::Status Sample(const step::StepPlan& plan, const step::SequenceStep& row, Pending* pending);
  static void AddToken(int32_t token, Slot* slot);

  FakeExecutorOptions options_;
  FakeFaults faults_;
  std::vector<Slot> slots_;
  std::vector<Block> blocks_;
  std::array<Pending, 2> pending_;
  size_t oldest_ = 0;
  int32_t in_flight_ = 0;
  uint64_t launches_ = 0;
  uint64_t waits_ = 0;
  Deadline last_done_{};
  uint64_t tokens_fed_ = 0;
  uint64_t rows_sampled_ = 0;
  absl::Status violation_;
};

}  // namespace nibble::testing
