// Which sequences run in the next step: continuous batching over a bounded pool of KV blocks.
//
// Pure: no threads, no clock, no device. The same calls give the same plans.
//
// Policy. Slots are given out fairly between tenants (fair_queue.h), and within a tenant first
// come, first served; who has had one is older than whom it was given to later. A step holds one
// row of every sequence that decodes, oldest first, then prompts in chunks, running ones before new
// ones. A new sequence gets blocks for all of its tokens at once, and only below the watermark (a
// lone one always). When a decoding sequence finds no block, the youngest sequence behind it gives
// all of its blocks back and is recomputed later, unless enough blocks are on their way already. A
// sequence that has been preempted preemptions_max times is admitted next with every block that it
// can ever need, and then is never a victim again: so each sequence ends.
//
// One step ahead. At most two steps are in flight: Schedule plans the next one while the result of
// the one before is unknown, and tells the executor to feed itself. A sequence that turns out to
// have ended still has a row in that step; its result is dropped. Blocks given back stay out of use
// until the last step with a row of their owner has retired.
//
// Prefixes. A block that is full gets a name once the step that filled it has retired, and whoever
// is admitted with the same salt takes the longest run of whole blocks that its tokens begin with
// instead of computing them; at least one token is left to compute. Only such blocks are shared,
// and they never change. Sequences that end by a result that is not finite take the names away.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "base/clock.h"
#include "worker/scheduling/block_pool.h"
#include "worker/scheduling/fair_queue.h"
#include "worker/scheduling/sequence.h"
#include "worker/step/executor.h"
#include "worker/step/group_stats.h"
#include "worker/step/step_plan.h"

namespace nibble::scheduling {

struct SchedulerOptions {
  step::ExecutorLimits limits;
  int32_t prefill_chunk_tokens = 512;  // prompt tokens of one step, all sequences together
  double kv_watermark = 0.90;          // no new prefill that takes more than this share of blocks
  int32_t preemptions_max = 4;         // of one sequence; then it gets what it can ever need
  size_t setup_bytes_max = size_t{2} << 20;  // of slots opened in one step; one always goes
  PrefixOptions prefix = {};
};

// Tokens that a prompt and its outputs may have together: the model's context, or the KV pool
// where that is smaller.
[[nodiscard]] int32_t ContextTokens(const step::ExecutorLimits& limits);

enum class EndReason : uint8_t {
  kStop,    // a stop id, which is its last token
  kLength,  // max_tokens, or the end of the context
  kCancelled,
  kExpired,       // its deadline
  kQueueTimeout,  // not admitted by its queue deadline
  kNonFinite,     // a logit was NaN or infinite
  kGroupEnded,
};

enum class EventKind : uint8_t { kAdmitted, kPreempted, kToken, kEnded };

// What happened to a sequence. Nothing follows its kEnded.
struct Event {
  uint64_t id = 0;
  EventKind kind = EventKind::kToken;
  // kAdmitted: of the prompt, what was looked for among cached prefixes, and what was found.
  int32_t queried_tokens = 0;
  int32_t cached_tokens = 0;
  // kToken. The alternatives are StepResult::top_logprobs [top_begin, +top_count) of the result
  // just committed.
  int32_t token_id = 0;
  float logprob = 0;
  int32_t top_begin = 0;
  int32_t top_count = 0;
  // kEnded.
  EndReason reason = EndReason::kStop;
  int32_t output_count = 0;
  int32_t preemptions = 0;
  bool was_admitted = false;
};

struct PlannedStep {
  uint64_t step_id = 0;
  step::StepKind kind = step::kDecodeStep;
  int32_t tokens = 0;
};

// One thread.
class Scheduler {
 public:
  explicit Scheduler(const SchedulerOptions& options);
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  void Add(SequenceSpec spec);
  // Unknown ids are no error.
  void Cancel(uint64_t id);
  // Ends what has passed a deadline.
  void Expire(Deadline now);
  void EndAll(EndReason reason);

  // Fills *plan with the next step, or returns nothing when no sequence can go on before the step
  // in flight has retired. What it returns must be launched. REQUIRES: in_flight() < 2.
  [[nodiscard]] std::optional<PlannedStep> Schedule(step::StepPlan* plan);

  // Takes in the result of the oldest step in flight. INTERNAL when it is no answer to that step:
  // the ranks have lost each other.
  [[nodiscard]] absl::Status Commit(const step::StepResult& result);

  // From the next step on, no more prompt tokens than this in one step; the option stays a limit
  // too.
  void LimitPrefill(int32_t tokens) { prefill_limit_ = tokens; }

  // What the calls since ClearEvents() did, in order.
  [[nodiscard]] const std::vector<Event>& events() const { return events_; }
  void ClearEvents() { events_.clear(); }

  [[nodiscard]] int32_t in_flight() const { return in_flight_; }
  [[nodiscard]] const BlockPool& blocks() const { return pool_; }
  [[nodiscard]] int32_t running() const { return static_cast<int32_t>(running_.size()); }
  [[nodiscard]] int32_t waiting() const {
    return queue_.size() + static_cast<int32_t>(preempted_.size());
  }
  // Positions computed whose blocks a preemption gave back, since the start.
  [[nodiscard]] uint64_t tokens_given_up() const { return tokens_given_up_; }
  // Blocks of prefixes looked for by name, since the start.
  [[nodiscard]] uint64_t prefix_lookups() const { return prefix_lookups_; }

  // INTERNAL names what does not hold. For tests.
  [[nodiscard]] absl::Status CheckInvariants() const;

 private:
  struct Row {
    Sequence* sequence;
    uint64_t id;  // a row whose sequence has ended since no longer finds it there
    int32_t slot;
    int32_t computed;  // positions of it when the step has retired
    bool sampled;
  };
  struct StepRecord {
    uint64_t step_id = 0;
    std::vector<Row> rows;
  };
  // What Schedule still may put into its step.
  struct Budget {
    int32_t step_tokens = 0;
    int32_t prefill_tokens = 0;
    size_t setup_bytes = 0;
  };

  void PlanDecodes(step::StepPlan* plan, Budget* budget);
  void PlanPrefills(step::StepPlan* plan, Budget* budget);
  void AdmitAndPrefill(step::StepPlan* plan, Budget* budget);
  void PlanChunk(Sequence* sequence, step::StepPlan* plan, Budget* budget);
  void AddRow(Sequence* sequence, int32_t token_count, step::StepPlan* plan);
  [[nodiscard]] bool GiveBlock(size_t running_index);
  [[nodiscard]] int32_t BlocksOnTheirWay() const;
  [[nodiscard]] Sequence* YoungestVictim(size_t behind) const;
  void Preempt(Sequence* sequence);
  [[nodiscard]] int32_t BlocksToAdmit(const Sequence& sequence) const;
  [[nodiscard]] bool MayAdmit(Sequence* sequence);
  void Admit(Sequence* sequence, step::StepPlan* plan);
  void TakePrefix(Sequence* sequence);
  void StopWaiting(Sequence* sequence);
  void ExpireOne(Sequence* sequence, Deadline now);

  absl::Status CheckAnswers(const StepRecord& record, const step::StepResult& result) const;
  void CommitSample(Sequence* sequence, const step::SampledSequence& sampled,
                    const step::StepResult& result);
  void End(Sequence* sequence, EndReason reason);
  void FindPrefix(Sequence* sequence, int32_t blocks_max);
  [[nodiscard]] PrefixBlock PrefixOf(Sequence* sequence, int32_t index, uint64_t before);
  void PublishPrefix(Sequence* sequence, int32_t computed);
  void PublishAgain(Sequence* sequence);
  void PublishBlocks(Sequence* sequence, int32_t first, int32_t end);
  void WithdrawPrefix(Sequence* sequence);
  [[nodiscard]] absl::Status CheckBlocks(const Sequence& sequence,
                                         std::vector<int32_t>* holders) const;
  void GiveUpSlotAndBlocks(Sequence* sequence);
  Sequence* NewSequence();

  SchedulerOptions options_;
  int32_t watermark_blocks_;
  BlockPool pool_;
  std::vector<int32_t> prefix_;           // blocks that FindPrefix found last
  std::vector<uint64_t> prefix_serials_;  // of their entries
  uint64_t prefix_arrival_ = 0;           // of the sequence that they were found for
  uint64_t prefix_lookups_ = 0;

  std::vector<std::unique_ptr<Sequence>> store_;  // every sequence object there is
  std::vector<Sequence*> unused_;
  FairQueue queue_;                   // never admitted
  std::vector<Sequence*> preempted_;  // oldest first; they go before the queue
  std::vector<Sequence*> running_;    // oldest first
  uint64_t arrivals_ = 0;
  uint64_t admissions_ = 0;
  Deadline next_deadline_ = Deadline::max();  // none of any sequence is earlier

  std::vector<int32_t> free_slots_;
  std::vector<int32_t> slots_to_close_;  // told to the executor by the next step
  int32_t starved_ = 0;                  // sequences that found no block in this Schedule

  std::array<StepRecord, 2> records_;  // of steps in flight, the oldest at oldest_record_
  size_t oldest_record_ = 0;
  int32_t in_flight_ = 0;
  uint64_t last_step_id_ = 0;
  int32_t prefill_limit_ = std::numeric_limits<int32_t>::max();
  uint64_t tokens_given_up_ = 0;

  std::vector<Event> events_;
};

}  // namespace nibble::scheduling
