// How results come in, how sequences end, and what must hold at any time.
#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status.h"
#include "worker/scheduling/scheduler.h"
#include "worker/scheduling/sequence_list.h"

namespace nibble::scheduling {

absl::Status Scheduler::CheckAnswers(const StepRecord& record,
                                     const step::StepResult& result) const {
  const auto wrong = [&](absl::string_view what) {
    return absl::InternalError(absl::StrCat("result of step ", record.step_id, ": ", what));
  };
  if (result.step_id != record.step_id) return wrong("names another step");
  size_t answered = 0;
  for (const Row& row : record.rows) {
    if (!row.sampled) continue;
    if (answered == result.sequences.size()) return wrong("has too few rows");
    if (result.sequences[answered++].slot != row.slot) return wrong("answers for another slot");
  }
  if (answered != result.sequences.size()) return wrong("has too many rows");
  for (const step::SampledSequence& sampled : result.sequences) {
    if (sampled.token_count != (sampled.non_finite ? 0 : 1)) return wrong("has a bad token count");
    if (sampled.non_finite) continue;
    if (sampled.token_begin < 0 ||
        static_cast<size_t>(sampled.token_begin) >= result.tokens.size()) {
      return wrong("has tokens out of range");
    }
    const int32_t token_id = result.tokens[static_cast<size_t>(sampled.token_begin)].token_id;
    if (token_id < 0 || token_id >= options_.limits.vocab_size) {
      return wrong("has a token outside the vocabulary");
    }
    if (sampled.top_begin < 0 || sampled.top_count < 0 ||
        int64_t{sampled.top_begin} + sampled.top_count >
            static_cast<int64_t>(result.top_logprobs.size())) {
      return wrong("has alternatives out of range");
    }
  }
  return absl::OkStatus();
}

absl::Status Scheduler::Commit(const step::StepResult& result) {
  CHECK(in_flight_ > 0);
  StepRecord& record = records_[oldest_record_];
  RETURN_IF_ERROR(CheckAnswers(record, result));
  oldest_record_ = (oldest_record_ + 1) % 2;
  --in_flight_;
  pool_.Retire(record.step_id);
  size_t next = 0;
  for (const Row& row : record.rows) {
    const step::SampledSequence* sampled = row.sampled ? &result.sequences[next++] : nullptr;
    Sequence* sequence = row.sequence;
    if (sequence->id != row.id) continue;  // ended since: nobody may see this
    --sequence->steps_in_flight;
    PublishPrefix(sequence, row.computed);  // and, if that was not finite, withdrawn below
    if (sampled != nullptr) CommitSample(sequence, *sampled, result);
  }
  return absl::OkStatus();
}

void Scheduler::CommitSample(Sequence* sequence, const step::SampledSequence& sampled,
                             const step::StepResult& result) {
  if (sampled.non_finite) {
    WithdrawPrefix(sequence);
    End(sequence, EndReason::kNonFinite);
    return;
  }
  const step::TokenLogprob& token = result.tokens[static_cast<size_t>(sampled.token_begin)];
  const bool may_stop = sequence->output_count() >= sequence->min_tokens;
  sequence->tokens.push_back(token.token_id);
  FairQueue::Charge(sequence, kOutputWeight);
  events_.push_back({.id = sequence->id,
                     .kind = EventKind::kToken,
                     .token_id = token.token_id,
                     .logprob = token.logprob,
                     .top_begin = sampled.top_begin,
                     .top_count = sampled.top_count});
  if (may_stop && sequence->IsStopId(token.token_id)) {
    End(sequence, EndReason::kStop);
  } else if (sequence->output_count() == sequence->outputs_max) {
    End(sequence, EndReason::kLength);
  }
}

void Scheduler::End(Sequence* sequence, EndReason reason) {
  events_.push_back({.id = sequence->id,
                     .kind = EventKind::kEnded,
                     .reason = reason,
                     .output_count = sequence->output_count(),
                     .preemptions = sequence->preemptions,
                     .was_admitted = sequence->admitted_before});
  if (sequence->state == SequenceState::kRunning) {
    Remove(sequence, &running_);
    GiveUpSlotAndBlocks(sequence);
  } else {
    StopWaiting(sequence);
  }
  queue_.Leave(sequence);
  if (sequence->prefix_owner != nullptr) pool_.prefixes().Leave(sequence->prefix_owner);
  sequence->prefix_owner = nullptr;
  // Rows in flight look for this id and drop their results.
  sequence->id = 0;
  sequence->state = SequenceState::kUnused;
  unused_.push_back(sequence);
}

void Scheduler::GiveUpSlotAndBlocks(Sequence* sequence) {
  PublishAgain(sequence);
  // The end of a prefix goes before what it follows.
  std::reverse(sequence->blocks.begin(), sequence->blocks.end());
  pool_.Free(sequence->blocks, sequence->last_step);
  sequence->blocks.clear();
  sequence->blocks_sent = 0;
  // The executor closes it before it opens anything in the same step.
  slots_to_close_.push_back(sequence->slot);
  free_slots_.push_back(sequence->slot);
  sequence->slot = -1;
}

absl::Status Scheduler::CheckInvariants() const {
  RETURN_IF_ERROR(pool_.CheckInvariants());
  const auto broken = [](const Sequence& sequence, absl::string_view what) {
    return absl::InternalError(absl::StrCat("sequence ", sequence.id, ": ", what));
  };
  std::vector<int32_t> holders(static_cast<size_t>(pool_.total()), 0);
  uint64_t order = 0;
  for (const Sequence* s : running_) {
    if (s->state != SequenceState::kRunning || s->slot < 0) return broken(*s, "has no slot");
    if (s->order <= order) return broken(*s, "is out of order");
    order = s->order;
    const int32_t capacity = static_cast<int32_t>(s->blocks.size()) * step::kBlockTokens;
    if (s->fed > capacity) return broken(*s, "was fed beyond its blocks");
    if (s->fed > s->positions_max()) return broken(*s, "was fed beyond its last position");
    if (s->outputs_planned > s->outputs_max) return broken(*s, "has too many outputs planned");
    if (s->preemptions > options_.preemptions_max) return broken(*s, "was preempted too often");
    RETURN_IF_ERROR(CheckBlocks(*s, &holders));
  }
  RETURN_IF_ERROR(queue_.CheckInvariants());
  std::vector<const Sequence*> waiting(preempted_.begin(), preempted_.end());
  queue_.ForEach([&waiting](Sequence* s) { waiting.push_back(s); });
  order = 0;
  for (const Sequence* s : waiting) {
    if (s->state != SequenceState::kWaiting) return broken(*s, "waits in the wrong state");
    if (s->admitted_before && s->order <= order) return broken(*s, "is out of order");
    order = s->order;
    if (s->slot >= 0 || !s->blocks.empty()) return broken(*s, "holds something while it waits");
  }
  for (int32_t block = 0; block < pool_.total(); ++block) {
    if (holders[static_cast<size_t>(block)] != pool_.holders(block)) {
      return absl::InternalError(absl::StrCat("block ", block, " has other holders than it knows"));
    }
  }
  if (static_cast<int32_t>(free_slots_.size() + running_.size()) != options_.limits.max_slots) {
    return absl::InternalError("slots do not add up");
  }
  return absl::OkStatus();
}

}  // namespace nibble::scheduling
