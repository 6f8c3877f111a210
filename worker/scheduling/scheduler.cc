#include "worker/scheduling/scheduler.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "worker/scheduling/sequence_list.h"

namespace nibble::scheduling {
namespace {

// Steps of ordinary requests grow no vector; longer ones grow theirs as they go.
constexpr int32_t kOutputsReserved = 4096;

int32_t BlocksFor(int32_t positions) {
  return (positions + step::kBlockTokens - 1) / step::kBlockTokens;
}

Sequence* Find(uint64_t id, const std::vector<Sequence*>& list) {
  const auto place =
      std::find_if(list.begin(), list.end(), [id](const Sequence* s) { return s->id == id; });
  return place == list.end() ? nullptr : *place;
}

// What opening its slot adds to a plan, a little more than exactly.
size_t SetupBytes(const Sequence& sequence) {
  return 128 + sequence.sampling.logit_bias.size() * sizeof(step::LogitBias) +
         (sequence.stop_ids.size() + sequence.tokens.size()) * sizeof(int32_t);
}

}  // namespace

int32_t ContextTokens(const step::ExecutorLimits& limits) {
  const int64_t pool = int64_t{limits.kv_blocks} * step::kBlockTokens;
  return static_cast<int32_t>(std::min<int64_t>(limits.max_context, pool));
}

Scheduler::Scheduler(const SchedulerOptions& options)
    : options_(options),
      watermark_blocks_(static_cast<int32_t>(options.kv_watermark * options.limits.kv_blocks)),
      pool_(options.limits.kv_blocks, options.prefix) {
  CHECK(options_.limits.max_slots > 0);
  CHECK(options_.limits.max_step_tokens > 0);
  CHECK(options_.prefill_chunk_tokens > 0);
  CHECK(options_.preemptions_max >= 0);
  prefix_.reserve(static_cast<size_t>(options_.limits.kv_blocks));
  prefix_serials_.reserve(static_cast<size_t>(options_.limits.kv_blocks));
  for (int32_t slot = options_.limits.max_slots - 1; slot >= 0; --slot) free_slots_.push_back(slot);
}

Scheduler::~Scheduler() = default;

Sequence* Scheduler::NewSequence() {
  if (unused_.empty()) {
    store_.push_back(std::make_unique<Sequence>());
    unused_.push_back(store_.back().get());
  }
  Sequence* sequence = unused_.back();
  unused_.pop_back();
  return sequence;
}

void Scheduler::Add(SequenceSpec spec) {
  const int32_t context = ContextTokens(options_.limits);
  CHECK(spec.id != 0);
  CHECK(!spec.prompt.empty());
  CHECK(spec.prompt.size() < static_cast<size_t>(context));
  CHECK(spec.max_tokens >= 1);
  Sequence* sequence = NewSequence();
  sequence->id = spec.id;
  sequence->arrival = ++arrivals_;
  sequence->state = SequenceState::kWaiting;
  sequence->admitted_before = false;
  sequence->tokens.assign(spec.prompt.begin(), spec.prompt.end());
  sequence->prompt_count = static_cast<int32_t>(spec.prompt.size());
  sequence->outputs_max = std::min(spec.max_tokens, context - sequence->prompt_count);
  const int32_t soon = std::min(sequence->outputs_max, kOutputsReserved);
  sequence->tokens.reserve(spec.prompt.size() + static_cast<size_t>(soon));
  const auto blocks_soon = static_cast<size_t>(BlocksFor(sequence->prompt_count + soon));
  sequence->blocks.reserve(blocks_soon);
  sequence->names.clear();
  if (options_.prefix.on && !spec.bypass_prefix_cache) {
    sequence->names.reserve(blocks_soon);
    sequence->prefix_owner = pool_.prefixes().Join(spec.prefix_salt);
  }
  sequence->outputs_planned = 0;
  sequence->fed = 0;
  sequence->steps_in_flight = 0;
  sequence->last_step = 0;
  sequence->preemptions = 0;
  sequence->sampling = std::move(spec.sampling);
  sequence->seed = spec.seed;
  sequence->min_tokens = spec.min_tokens;
  sequence->stop_ids = std::move(spec.stop_ids);
  sequence->logprobs = spec.logprobs;
  sequence->deadline = spec.deadline;
  sequence->queue_deadline = spec.queue_deadline;
  next_deadline_ = std::min({next_deadline_, spec.deadline, spec.queue_deadline});
  queue_.Join(spec.tenant, spec.priority, sequence);
  queue_.Push(sequence);
}

void Scheduler::Cancel(uint64_t id) {
  Sequence* sequence = Find(id, running_);
  if (sequence == nullptr) sequence = Find(id, preempted_);
  if (sequence == nullptr) sequence = queue_.Find(id);
  if (sequence != nullptr) End(sequence, EndReason::kCancelled);
}

void Scheduler::Expire(Deadline now) {
  if (now < next_deadline_) return;
  next_deadline_ = Deadline::max();
  // Backwards, because End() takes the sequence out of its list.
  for (const std::vector<Sequence*>* list : {&running_, &preempted_}) {
    for (size_t i = list->size(); i-- > 0;) ExpireOne((*list)[i], now);
  }
  queue_.ForEach([this, now](Sequence* sequence) { ExpireOne(sequence, now); });
}

void Scheduler::ExpireOne(Sequence* sequence, Deadline now) {
  const bool queued = !sequence->admitted_before;
  if (sequence->deadline <= now) return End(sequence, EndReason::kExpired);
  if (queued && sequence->queue_deadline <= now) return End(sequence, EndReason::kQueueTimeout);
  next_deadline_ = std::min(next_deadline_, sequence->deadline);
  if (queued) next_deadline_ = std::min(next_deadline_, sequence->queue_deadline);
}

void Scheduler::EndAll(EndReason reason) {
  while (!running_.empty()) End(running_.back(), reason);
  while (!preempted_.empty()) End(preempted_.back(), reason);
  queue_.ForEach([this, reason](Sequence* sequence) { End(sequence, reason); });
}

std::optional<PlannedStep> Scheduler::Schedule(step::StepPlan* plan) {
  CHECK(in_flight_ < 2);
  plan->Clear();
  StepRecord& record = records_[(oldest_record_ + static_cast<size_t>(in_flight_)) % 2];
  record.rows.clear();
  record.step_id = last_step_id_ + 1;
  starved_ = 0;
  Budget budget = {.step_tokens = options_.limits.max_step_tokens,
                   .prefill_tokens = std::min(options_.prefill_chunk_tokens, prefill_limit_),
                   .setup_bytes = options_.setup_bytes_max};
  // AddRow writes to the record behind the steps in flight.
  PlanDecodes(plan, &budget);
  const bool decodes = !plan->sequences.empty();
  const size_t decode_rows = plan->sequences.size();
  PlanPrefills(plan, &budget);
  // Blocks that are free now belong to those who starve.
  if (starved_ == 0) AdmitAndPrefill(plan, &budget);
  if (plan->sequences.empty()) return std::nullopt;

  const bool prefills = plan->sequences.size() > decode_rows;
  plan->step_id = ++last_step_id_;
  plan->closed.assign(slots_to_close_.begin(), slots_to_close_.end());
  slots_to_close_.clear();
  ++in_flight_;
  return PlannedStep{
      .step_id = plan->step_id,
      .kind = decodes && prefills ? step::kMixedStep
              : prefills          ? step::kPrefillStep
                                  : step::kDecodeStep,
      .tokens = static_cast<int32_t>(plan->token_ids.size()),
  };
}

void Scheduler::PlanDecodes(step::StepPlan* plan, Budget* budget) {
  // A preemption takes sequences out of running_, but only behind the current one.
  for (size_t i = 0; i < running_.size() && budget->step_tokens > 0; ++i) {
    Sequence* sequence = running_[i];
    if (sequence->prefilling || sequence->AllPlanned()) continue;
    const int32_t blocks = static_cast<int32_t>(sequence->blocks.size());
    if (sequence->fed == blocks * step::kBlockTokens && !GiveBlock(i)) continue;
    AddRow(sequence, 1, plan);
    --budget->step_tokens;
  }
}

// One more block for running_[running_index], from a younger sequence if need be.
bool Scheduler::GiveBlock(size_t running_index) {
  Sequence* sequence = running_[running_index];
  if (pool_.Allocate(1, &sequence->blocks)) return true;
  ++starved_;
  while (BlocksOnTheirWay() < starved_) {
    Sequence* victim = YoungestVictim(running_index);
    if (victim == nullptr) return false;
    Preempt(victim);
    if (pool_.Allocate(1, &sequence->blocks)) {
      --starved_;
      return true;
    }
  }
  return false;
}

// Blocks that will be free without anyone's loss, once the steps in flight have retired.
int32_t Scheduler::BlocksOnTheirWay() const {
  int32_t blocks = pool_.quarantined();
  for (const Sequence* sequence : running_) {
    if (!sequence->AllPlanned()) continue;
    for (const int32_t block : sequence->blocks) blocks += pool_.holders(block) == 1 ? 1 : 0;
  }
  return blocks;
}

Sequence* Scheduler::YoungestVictim(size_t behind) const {
  for (size_t i = running_.size(); i-- > behind + 1;) {
    Sequence* sequence = running_[i];
    if (sequence->preemptions < options_.preemptions_max && !sequence->AllPlanned()) {
      return sequence;
    }
  }
  return nullptr;
}

// What it has in flight still counts when it comes back; it is not admitted again before that.
void Scheduler::Preempt(Sequence* sequence) {
  Remove(sequence, &running_);
  GiveUpSlotAndBlocks(sequence);
  sequence->state = SequenceState::kWaiting;
  tokens_given_up_ += static_cast<uint64_t>(sequence->fed - sequence->cached);
  sequence->fed = 0;
  ++sequence->preemptions;
  InsertByAge(sequence, &preempted_);
  events_.push_back({.id = sequence->id, .kind = EventKind::kPreempted});
}

void Scheduler::PlanPrefills(step::StepPlan* plan, Budget* budget) {
  for (Sequence* sequence : running_) {
    if (sequence->prefilling) PlanChunk(sequence, plan, budget);
  }
}

void Scheduler::PlanChunk(Sequence* sequence, step::StepPlan* plan, Budget* budget) {
  const int32_t count = std::min(
      {sequence->token_count() - sequence->fed, budget->prefill_tokens, budget->step_tokens});
  if (count == 0) return;
  AddRow(sequence, count, plan);
  budget->prefill_tokens -= count;
  budget->step_tokens -= count;
}

void Scheduler::AdmitAndPrefill(step::StepPlan* plan, Budget* budget) {
  while (!free_slots_.empty() && budget->step_tokens > 0 && budget->prefill_tokens > 0) {
    Sequence* sequence = preempted_.empty() ? queue_.Next() : preempted_.front();
    if (sequence == nullptr || !MayAdmit(sequence)) return;
    const size_t setup_bytes = SetupBytes(*sequence);
    if (!plan->opened.empty() && setup_bytes > budget->setup_bytes) return;
    Admit(sequence, plan);
    budget->setup_bytes -= std::min(budget->setup_bytes, setup_bytes);
    PlanChunk(sequence, plan, budget);
  }
}

// Room for its tokens and the first one to come; after too many preemptions, for everything.
int32_t Scheduler::BlocksToAdmit(const Sequence& sequence) const {
  const bool reserve = sequence.preemptions >= options_.preemptions_max;
  const int32_t positions = reserve
                                ? sequence.positions_max()
                                : std::min(sequence.token_count() + 1, sequence.positions_max());
  return BlocksFor(positions);
}

// Blocks of its prefix that others hold cost nothing; those that are cached are available no more.
bool Scheduler::MayAdmit(Sequence* sequence) {
  if (sequence->steps_in_flight > 0) return false;
  FindPrefix(sequence, (sequence->token_count() - 1) / step::kBlockTokens);
  const auto held = std::count_if(prefix_.begin(), prefix_.end(),
                                  [this](int32_t block) { return !pool_.IsCached(block); });
  const int32_t need = BlocksToAdmit(*sequence) - static_cast<int32_t>(held);
  if (need > pool_.available()) return false;
  return running_.empty() || pool_.total() - pool_.available() + need <= watermark_blocks_;
}

void Scheduler::StopWaiting(Sequence* sequence) {
  if (sequence->admitted_before) {
    Remove(sequence, &preempted_);
  } else {
    queue_.Remove(sequence);
  }
}

// Holds what FindPrefix has just found, so that nothing of it is handed out for what is missing.
void Scheduler::TakePrefix(Sequence* sequence) {
  for (const int32_t block : prefix_) pool_.Hold(block);
  sequence->blocks.assign(prefix_.begin(), prefix_.end());
  sequence->has_twins = false;
  sequence->published = static_cast<int32_t>(prefix_.size());
  sequence->published_block = prefix_.empty() ? -1 : prefix_.back();
  sequence->published_serial = prefix_.empty() ? 0 : pool_.prefixes().Serial(prefix_.back());
  sequence->cached = sequence->published * step::kBlockTokens;
  sequence->fed = sequence->cached;
}

void Scheduler::Admit(Sequence* sequence, step::StepPlan* plan) {
  StopWaiting(sequence);
  TakePrefix(sequence);
  if (!sequence->admitted_before) {
    sequence->order = ++admissions_;
    // Only what is computed counts: what is cached costs nobody anything.
    const auto computed = static_cast<uint64_t>(sequence->prompt_count - sequence->cached);
    FairQueue::Charge(sequence, kPromptWeight * computed);
  }
  InsertByAge(sequence, &running_);
  sequence->state = SequenceState::kRunning;
  sequence->slot = free_slots_.back();
  free_slots_.pop_back();
  CHECK(pool_.Allocate(BlocksToAdmit(*sequence) - sequence->published, &sequence->blocks));
  sequence->prefilling = true;
  plan->opened.push_back({.slot = sequence->slot,
                          .seed = sequence->seed,
                          .sampling = sequence->sampling,
                          .stop_ids = sequence->stop_ids,
                          .min_tokens = sequence->min_tokens,
                          .history = sequence->tokens,
                          .prompt_count = sequence->prompt_count});
  if (!sequence->admitted_before) {
    sequence->admitted_before = true;
    const bool queried = sequence->prefix_owner != nullptr;
    events_.push_back({.id = sequence->id,
                       .kind = EventKind::kAdmitted,
                       .queried_tokens = queried ? sequence->prompt_count : 0,
                       .cached_tokens = sequence->cached});
  }
}

void Scheduler::AddRow(Sequence* sequence, int32_t token_count, step::StepPlan* plan) {
  const int32_t known = sequence->token_count();
  // The one token that may be unknown is what the step in flight samples.
  const bool feed_sampled = sequence->fed >= known;
  const bool samples =
      sequence->fed + token_count == sequence->prompt_count + sequence->outputs_planned;
  plan->sequences.push_back({
      .slot = sequence->slot,
      .first_position = sequence->fed,
      .token_begin = static_cast<int32_t>(plan->token_ids.size()),
      .token_count = token_count,
      .feed_sampled = feed_sampled,
      .block_table_index = sequence->blocks_sent,
      .block_begin = static_cast<int32_t>(plan->block_ids.size()),
      .block_count = static_cast<int32_t>(sequence->blocks.size()) - sequence->blocks_sent,
      .draft_count = 0,
      .sample_count = samples ? 1 : 0,
      .logprobs = samples ? sequence->logprobs : -1,
      .mask = step::MaskSource::kNone,
  });
  if (feed_sampled) {
    CHECK(token_count == 1);
    plan->token_ids.push_back(-1);
  } else {
    const auto first = sequence->tokens.begin() + sequence->fed;
    plan->token_ids.insert(plan->token_ids.end(), first, first + token_count);
  }
  plan->block_ids.insert(plan->block_ids.end(), sequence->blocks.begin() + sequence->blocks_sent,
                         sequence->blocks.end());
  sequence->blocks_sent = static_cast<int32_t>(sequence->blocks.size());
  sequence->fed += token_count;
  sequence->last_step = last_step_id_ + 1;
  ++sequence->steps_in_flight;
  if (samples) {
    ++sequence->outputs_planned;
    sequence->prefilling = false;
  }
  StepRecord& record = records_[(oldest_record_ + static_cast<size_t>(in_flight_)) % 2];
  record.rows.push_back({.sequence = sequence,
                         .id = sequence->id,
                         .slot = sequence->slot,
                         .computed = sequence->fed,
                         .sampled = samples});
}

}  // namespace nibble::scheduling
