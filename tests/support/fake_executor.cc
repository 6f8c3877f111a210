#include "tests/support/fake_executor.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status.h"

namespace nibble::testing {
namespace {

uint64_t SplitMix64(uint64_t value) {
  value += 0x9E3779B97F4A7C15;
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EB;
  return value ^ (value >> 31);
}

uint64_t HashOf(uint64_t seed, uint64_t index) { return SplitMix64(SplitMix64(seed) ^ index); }

// Of a token that follows the one with the canary `before`.
uint64_t Canary(uint64_t before, int32_t token) {
  return SplitMix64(before * 0x100000001B3 + static_cast<uint64_t>(token) + 1);
}

template <typename... Parts>
absl::Status Broken(const Parts&... parts) {
  return absl::InternalError(absl::StrCat("fake executor: ", parts...));
}

}  // namespace

int32_t FakeToken(uint64_t seed, int32_t index, int32_t vocab_size) {
  return static_cast<int32_t>(HashOf(seed, static_cast<uint64_t>(index)) %
                              static_cast<uint64_t>(vocab_size));
}

int32_t FakeToken(uint64_t seed, int32_t index, int32_t vocab_size,
                  std::span<const int32_t> stop_ids, int32_t min_tokens) {
  int32_t token = FakeToken(seed, index, vocab_size);
  if (index >= min_tokens) return token;
  for (int32_t tries = 0; tries < vocab_size; ++tries) {
    if (std::find(stop_ids.begin(), stop_ids.end(), token) == stop_ids.end()) break;
    token = (token + 1) % vocab_size;
  }
  return token;
}

float FakeLogprob(uint64_t seed, int32_t index, int32_t rank) {
  const uint64_t hash = HashOf(~seed, static_cast<uint64_t>(index));
  return -static_cast<float>(hash % 1000) / 1000.0f - static_cast<float>(rank);
}

FakeExecutor::FakeExecutor(FakeExecutorOptions options, FakeFaults faults)
    : options_(std::move(options)), faults_(std::move(faults)) {
  CHECK(options_.limits.vocab_size > 0);
  slots_.resize(static_cast<size_t>(options_.limits.max_slots));
  blocks_.resize(static_cast<size_t>(options_.limits.kv_blocks));
}

int32_t FakeExecutor::open_slots() const {
  return static_cast<int32_t>(
      std::count_if(slots_.begin(), slots_.end(), [](const Slot& slot) { return slot.open; }));
}

absl::Status FakeExecutor::Launch(const step::StepPlan& plan) {
  RETURN_IF_ERROR(violation_);
  if (plan.step_id == faults_.launch_error_at) return Broken("Launch was told to fail");
  if (in_flight_ == 2) return violation_ = Broken("a third step was launched");
  Pending& pending = pending_[(oldest_ + static_cast<size_t>(in_flight_)) % 2];
  pending.result.Clear();
  pending.result.step_id = plan.step_id;
  ++launches_;
  violation_ = Apply(plan, &pending);
  RETURN_IF_ERROR(violation_);
  if (options_.clock != nullptr) {
    const auto tokens = static_cast<Duration::rep>(plan.token_ids.size());
    last_done_ = std::max(last_done_, options_.clock->Now()) + options_.step_base +
                 options_.step_per_token * tokens;
    pending.done = last_done_;
  }
  ++in_flight_;
  return absl::OkStatus();
}

absl::Status FakeExecutor::ProvideMasks(const step::MaskBatch&) {
  return absl::UnimplementedError("fake executor: takes no masks");
}

absl::Status FakeExecutor::Wait(Deadline deadline, step::StepResult* result) {
  RETURN_IF_ERROR(violation_);
  if (in_flight_ == 0) return violation_ = Broken("Wait without a step in flight");
  Pending& pending = pending_[oldest_];
  const uint64_t step_id = pending.result.step_id;
  if (step_id == faults_.wait_error_at) return Broken("Wait was told to fail");
  const bool late = pending.done > deadline || step_id == faults_.hang_at;
  if (options_.sleep_until) options_.sleep_until(late ? deadline : pending.done);
  if (late) {
    return absl::DeadlineExceededError(
        absl::StrCat("fake executor: step ", step_id, " is not done"));
  }
  std::swap(*result, pending.result);
  oldest_ = (oldest_ + 1) % 2;
  --in_flight_;
  ++waits_;
  return absl::OkStatus();
}

absl::Status FakeExecutor::Apply(const step::StepPlan& plan, Pending* pending) {
  if (plan.token_ids.size() > static_cast<size_t>(options_.limits.max_step_tokens)) {
    return Broken("step ", plan.step_id, " has ", plan.token_ids.size(), " tokens; limit is ",
                  options_.limits.max_step_tokens);
  }
  for (const int32_t slot : plan.closed) RETURN_IF_ERROR(Close(slot));
  for (const step::SlotSetup& setup : plan.opened) RETURN_IF_ERROR(Open(setup));
  for (const step::SequenceStep& row : plan.sequences) {
    if (row.slot < 0 || row.slot >= options_.limits.max_slots ||
        !slots_[static_cast<size_t>(row.slot)].open) {
      return Broken("slot ", row.slot, " has a row and is not open");
    }
    if (slots_[static_cast<size_t>(row.slot)].last_launch == launches_) {
      return Broken("slot ", row.slot, " has two rows in one step");
    }
    RETURN_IF_ERROR(TakeBlocks(plan, row));
    RETURN_IF_ERROR(Feed(plan, row));
    if (row.sample_count > 0) RETURN_IF_ERROR(Sample(plan, row, pending));
  }
  return absl::OkStatus();
}

absl::Status FakeExecutor::Close(int32_t slot_index) {
  if (slot_index < 0 || slot_index >= options_.limits.max_slots ||
      !slots_[static_cast<size_t>(slot_index)].open) {
    return Broken("slot ", slot_index, " was closed and is not open");
  }
  Slot& slot = slots_[static_cast<size_t>(slot_index)];
  for (const int32_t id : slot.table) {
    Block& block = blocks_[static_cast<size_t>(id)];
    --block.holders;
    if (block.writer == slot_index) block.writer = -1;
    block.last_launch = std::max(block.last_launch, slot.last_launch);
  }
  slot.table.clear();
  slot.tokens.clear();
  slot.canaries.clear();
  slot.open = false;
  return absl::OkStatus();
}

absl::Status FakeExecutor::Open(const step::SlotSetup& setup) {
  if (setup.slot < 0 || setup.slot >= options_.limits.max_slots) {
    return Broken("slot ", setup.slot, " does not exist");
  }
  Slot& slot = slots_[static_cast<size_t>(setup.slot)];
  if (slot.open) return Broken("slot ", setup.slot, " was opened twice");
  const auto history = static_cast<int32_t>(setup.history.size());
  if (setup.prompt_count < 1 || setup.prompt_count > history) {
    return Broken("slot ", setup.slot, " was opened with a prompt count of ", setup.prompt_count);
  }
  for (int32_t i = setup.prompt_count; i < history; ++i) {
    const int32_t expected =
        FakeToken(setup.seed, i - setup.prompt_count, options_.limits.vocab_size, setup.stop_ids,
                  setup.min_tokens);
    if (setup.history[static_cast<size_t>(i)] != expected) {
      return Broken("slot ", setup.slot, " was reopened with another history than it generated");
    }
  }
  slot.open = true;
  slot.seed = setup.seed;
  slot.prompt_count = setup.prompt_count;
  slot.min_tokens = setup.min_tokens;
  slot.stop_ids = setup.stop_ids;
  slot.tokens.reserve(static_cast<size_t>(options_.limits.max_context) + 1);
  slot.canaries.reserve(slot.tokens.capacity());
  for (const int32_t token : setup.history) AddToken(token, &slot);
  slot.table.reserve(static_cast<size_t>(options_.limits.max_context / step::kBlockTokens) + 1);
  slot.fed = 0;
  slot.last_launch = 0;
  return absl::OkStatus();
}

absl::Status FakeExecutor::TakeBlocks(const step::StepPlan& plan, const step::SequenceStep& row) {
  Slot& slot = slots_[static_cast<size_t>(row.slot)];
  if (row.block_count > 0 && row.block_table_index != static_cast<int32_t>(slot.table.size())) {
    return Broken("slot ", row.slot, " has a hole in its block table");
  }
  for (int32_t i = 0; i < row.block_count; ++i) {
    const int32_t id = plan.block_ids[static_cast<size_t>(row.block_begin + i)];
    if (id < 0 || id >= options_.limits.kv_blocks) return Broken("block ", id, " does not exist");
    const auto end = static_cast<int32_t>(slot.table.size() + 1) * step::kBlockTokens;
    const bool cached = slot.last_launch == 0 && end <= row.first_position;
    RETURN_IF_ERROR(cached ? TakeCached(id, row.slot) : TakeNew(id, row.slot));
    ++blocks_[static_cast<size_t>(id)].holders;
    slot.table.push_back(id);
  }
  return absl::OkStatus();
}

absl::Status FakeExecutor::TakeNew(int32_t id, int32_t slot_index) {
  Block& block = blocks_[static_cast<size_t>(id)];
  if (block.holders > 0) {
    return Broken("block ", id, " of an open slot was given to slot ", slot_index);
  }
  if (block.last_launch > waits_) {
    return Broken("block ", id, " was given to slot ", slot_index, " while launch ",
                  block.last_launch, " may touch it");
  }
  block.writer = slot_index;
  block.canaries.fill(0);
  return absl::OkStatus();
}

absl::Status FakeExecutor::TakeCached(int32_t id, int32_t slot_index) {
  const Slot& slot = slots_[static_cast<size_t>(slot_index)];
  const Block& block = blocks_[static_cast<size_t>(id)];
  if (block.last_write > waits_) {
    return Broken("block ", id, " was given to slot ", slot_index, " as cached while launch ",
                  block.last_write, " writes to it");
  }
  const size_t first = slot.table.size() * step::kBlockTokens;
  if (first + step::kBlockTokens > slot.canaries.size() ||
      !std::equal(block.canaries.begin(), block.canaries.end(),
                  slot.canaries.begin() + static_cast<std::ptrdiff_t>(first))) {
    return Broken("block ", id, " was given to slot ", slot_index, " and holds another prefix");
  }
  return absl::OkStatus();
}

void FakeExecutor::AddToken(int32_t token, Slot* slot) {
  slot->canaries.push_back(Canary(slot->canaries.empty() ? 0 : slot->canaries.back(), token));
  slot->tokens.push_back(token);
}

absl::Status FakeExecutor::Feed(const step::StepPlan& plan, const step::SequenceStep& row) {
  Slot& slot = slots_[static_cast<size_t>(row.slot)];
  // Only cached blocks, which have been checked, may stand before its first row.
  const bool after_cached = slot.last_launch == 0 && row.first_position > 0 &&
                            row.first_position % step::kBlockTokens == 0;
  if (row.first_position != slot.fed && !after_cached) {
    return Broken("slot ", row.slot, " was fed from position ", row.first_position,
                  "; the next is ", slot.fed);
  }
  const int32_t end = row.first_position + row.token_count;
  if (end > static_cast<int32_t>(slot.tokens.size())) {
    return Broken("slot ", row.slot, " was fed tokens that it does not have");
  }
  if (end > options_.limits.max_context) {
    return Broken("slot ", row.slot, " was fed beyond the context");
  }
  if (end > static_cast<int32_t>(slot.table.size()) * step::kBlockTokens) {
    return Broken("slot ", row.slot, " has no block for position ", end - 1);
  }
  for (int32_t i = 0; i < row.token_count; ++i) {
    const int32_t position = row.first_position + i;
    const int32_t token = slot.tokens[static_cast<size_t>(position)];
    const int32_t given = plan.token_ids[static_cast<size_t>(row.token_begin + i)];
    const bool from_slot = row.feed_sampled && i == 0;
    if (from_slot && (given != -1 || position + 1 != static_cast<int32_t>(slot.tokens.size()))) {
      return Broken("slot ", row.slot, " was told to feed what it did not sample last");
    }
    if (!from_slot && given != token) {
      return Broken("slot ", row.slot, " was fed token ", given, " at position ", position,
                    "; it has ", token, " there");
    }
    const int32_t id = slot.table[static_cast<size_t>(position / step::kBlockTokens)];
    Block& block = blocks_[static_cast<size_t>(id)];
    if (block.writer != row.slot || block.holders > 1) {
      return Broken("slot ", row.slot, " writes to block ", id, ", which others may read");
    }
    block.canaries[static_cast<size_t>(position % step::kBlockTokens)] =
        slot.canaries[static_cast<size_t>(position)];
    block.last_write = launches_;
  }
  slot.fed = end;
  slot.last_launch = launches_;
  tokens_fed_ += static_cast<uint64_t>(row.token_count);
  if (options_.check_whole_history) return CheckCanaries(row.slot, 0, end - 1);
  const int32_t middle = static_cast<int32_t>(plan.step_id % static_cast<uint64_t>(end));
  RETURN_IF_ERROR(CheckCanaries(row.slot, 0, 0));
  return CheckCanaries(row.slot, middle, middle);
}

absl::Status FakeExecutor::CheckCanaries(int32_t slot_index, int32_t first, int32_t last) const {
  const Slot& slot = slots_[static_cast<size_t>(slot_index)];
  for (int32_t position = first; position <= last; ++position) {
    const int32_t id = slot.table[static_cast<size_t>(position / step::kBlockTokens)];
    const Block& block = blocks_[static_cast<size_t>(id)];
    if (block.canaries[static_cast<size_t>(position % step::kBlockTokens)] !=
        slot.canaries[static_cast<size_t>(position)]) {
      return Broken("slot ", slot_index, " finds another's data at position ", position);
    }
  }
  return absl::OkStatus();
}

absl::Status FakeExecutor::Sample(const step::StepPlan& plan, const step::SequenceStep& row,
                                  Pending* pending) {
  Slot& slot = slots_[static_cast<size_t>(row.slot)];
  if (slot.fed != static_cast<int32_t>(slot.tokens.size())) {
    return Broken("slot ", row.slot, " was sampled before all of its tokens were fed");
  }
  ++rows_sampled_;
  step::StepResult& result = pending->result;
  step::SampledSequence sampled = {.slot = row.slot,
                                   .token_begin = static_cast<int32_t>(result.tokens.size()),
                                   .top_begin = static_cast<int32_t>(result.top_logprobs.size())};
  const int32_t index = slot.fed - slot.prompt_count;
  const int32_t vocab = options_.limits.vocab_size;
  const int32_t token = FakeToken(slot.seed, index, vocab, slot.stop_ids, slot.min_tokens);
  AddToken(token, &slot);
  if (faults_.non_finite && faults_.non_finite(plan.step_id, row.slot)) {
    sampled.non_finite = true;
  } else {
    sampled.token_count = 1;
    const bool logprobs = row.logprobs >= 0;
    result.tokens.push_back(
        {.token_id = token, .logprob = logprobs ? FakeLogprob(slot.seed, index, 0) : 0});
    for (int32_t rank = 0; rank < row.logprobs; ++rank) {
      result.top_logprobs.push_back(
          {.token_id = (token + rank) % vocab, .logprob = FakeLogprob(slot.seed, index, rank)});
      ++sampled.top_count;
    }
  }
  result.sequences.push_back(sampled);
  return absl::OkStatus();
}

}  // namespace nibble::testing
