// Bytes as a history of requests, cancels, deadlines and steps: every request ends exactly once,
// the invariants hold after every operation, and nothing is held at the end.
#include <algorithm>
#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>

#include "base/check.h"
#include "worker/scheduling/scheduler.h"

namespace nibble::scheduling {
namespace {

constexpr int32_t kVocab = 16;
constexpr size_t kOperationsMax = 512;
constexpr int kTurnsToEndMax = 100'000;

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : rest_(data, std::min(size, kOperationsMax)) {}
  [[nodiscard]] bool empty() const { return rest_.empty(); }
  int32_t Next() {
    if (rest_.empty()) return 0;
    const int32_t byte = rest_.front();
    rest_ = rest_.subspan(1);
    return byte;
  }
  int32_t Between(int32_t low, int32_t high) { return low + Next() % (high - low + 1); }

 private:
  std::span<const uint8_t> rest_;
};

SchedulerOptions OptionsFrom(Bytes* bytes) {
  SchedulerOptions options;
  options.limits = {.vocab_size = kVocab,
                    .max_context = bytes->Between(20, 120),
                    .max_slots = bytes->Between(1, 6),
                    .max_step_tokens = bytes->Between(1, 64),
                    .kv_blocks = bytes->Between(4, 20)};
  options.prefill_chunk_tokens = bytes->Between(1, 64);
  options.kv_watermark = 0.1 * bytes->Between(3, 10);
  options.preemptions_max = bytes->Between(0, 4);
  return options;
}

class History {
 public:
  explicit History(Bytes* bytes)
      : bytes_(*bytes), options_(OptionsFrom(bytes)), scheduler_(options_) {}

  void Run() {
    while (!bytes_.empty()) {
      Operate();
      TakeEvents();
    }
    for (int turn = 0; scheduler_.running() + scheduler_.waiting() > 0; ++turn) {
      CHECK_MSG(turn < kTurnsToEndMax, "a request never ends");
      Step();
      TakeEvents(/*check=*/turn % 16 == 0);
    }
    while (!in_flight_.empty()) Retire();
    TakeEvents();
    for (const auto& [id, ended] : ended_) CHECK_MSG(ended, "a request has not ended");
    CHECK(scheduler_.blocks().quarantined() == 0);
    CHECK(scheduler_.blocks().available() == options_.limits.kv_blocks);
  }

 private:
  void Operate() {
    switch (bytes_.Between(0, 6)) {
      case 0:
      case 1:
        return Add();
      case 2:
        return scheduler_.Cancel(static_cast<uint64_t>(bytes_.Between(0, 40)));
      case 3:
        now_ += bytes_.Between(0, 9);
        return scheduler_.Expire(Deadline(Duration(now_)));
      case 4:
        return scheduler_.LimitPrefill(bytes_.Between(1, 64));
      default:
        return Step();
    }
  }

  void Add() {
    const int32_t context = ContextTokens(options_.limits);
    SequenceSpec spec;
    spec.id = ended_.size() + 1;
    spec.prompt.assign(static_cast<size_t>(bytes_.Between(1, context - 1)), 3);
    spec.max_tokens = bytes_.Between(1, context);
    spec.min_tokens = bytes_.Between(0, 3);
    const int32_t kind = bytes_.Next();
    if (kind % 2 == 1) spec.prompt[spec.prompt.size() / 2] = kind % kVocab;
    spec.prefix_salt.assign(static_cast<size_t>(kind / 8 % 2), 's');
    spec.bypass_prefix_cache = kind / 16 % 8 == 0;
    if (bytes_.Next() % 2 == 0) spec.stop_ids = {bytes_.Between(0, kVocab - 1)};
    if (bytes_.Next() % 4 == 0) spec.deadline = Deadline(Duration(now_ + bytes_.Next()));
    if (bytes_.Next() % 4 == 0) spec.queue_deadline = Deadline(Duration(now_ + bytes_.Next()));
    ended_[spec.id] = false;
    scheduler_.Add(std::move(spec));
  }

  // One step ahead, as the engine does it.
  void Step() {
    const bool planned = scheduler_.in_flight() < 2 && Launch();
    if (scheduler_.in_flight() == 2 || (!planned && !in_flight_.empty())) Retire();
  }

  bool Launch() {
    step::StepPlan plan;
    const std::optional<PlannedStep> step = scheduler_.Schedule(&plan);
    if (!step.has_value()) return false;
    step::StepResult result;
    result.step_id = step->step_id;
    for (const step::SequenceStep& row : plan.sequences) {
      if (row.sample_count == 0) continue;
      step::SampledSequence sampled;
      sampled.slot = row.slot;
      sampled.token_begin = static_cast<int32_t>(result.tokens.size());
      sampled.non_finite = bytes_.Next() == 255;
      sampled.token_count = sampled.non_finite ? 0 : 1;
      result.sequences.push_back(sampled);
      if (!sampled.non_finite) result.tokens.push_back({.token_id = bytes_.Next() % kVocab});
    }
    in_flight_.push_back(std::move(result));
    return true;
  }

  void Retire() {
    CHECK(scheduler_.Commit(in_flight_.front()).ok());
    in_flight_.pop_front();
  }

  void TakeEvents(bool check = true) {
    for (const Event& event : scheduler_.events()) {
      const auto found = ended_.find(event.id);
      CHECK(found != ended_.end());
      CHECK_MSG(!found->second, "something follows an end");
      found->second = event.kind == EventKind::kEnded;
    }
    scheduler_.ClearEvents();
    if (!check) return;
    const absl::Status status = scheduler_.CheckInvariants();
    CHECK_MSG(status.ok(), std::string(status.message()));
  }

  Bytes& bytes_;
  const SchedulerOptions options_;
  Scheduler scheduler_;
  std::map<uint64_t, bool> ended_;
  std::deque<step::StepResult> in_flight_;
  int64_t now_ = 0;
};

}  // namespace
}  // namespace nibble::scheduling

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  nibble::scheduling::Bytes bytes(data, size);
  nibble::scheduling::History(&bytes).Run();
  return 0;
}
