#include "worker/group/rank_mirror.h"

#include <limits>

#include "absl/strings/str_cat.h"
#include "base/exit_codes.h"
#include "worker/group/machine_link.h"

namespace nibble::group {
namespace {

constexpr auto kIntMax = static_cast<uint32_t>(std::numeric_limits<int32_t>::max());

bool Sensible(const worker::v1::RankState& state, RankRange allowed) {
  return state.rank() <= kIntMax && allowed.Contains(static_cast<int32_t>(state.rank())) &&
         state.rank() < static_cast<uint32_t>(step::kMaxRanks) &&
         state.phase() <= static_cast<uint32_t>(RankPhase::kServing) &&
         state.rank_count() <= kIntMax && state.kv_blocks() <= kIntMax &&
         state.load_bytes_done() <= std::numeric_limits<int64_t>::max() &&
         state.load_bytes_total() <= std::numeric_limits<int64_t>::max();
}

void Apply(const worker::v1::RankState& state, RankSlot* slot, step::RankStats* stats) {
  slot->model_hash = state.model_hash();
  slot->config_hash = state.config_hash();
  slot->build_hash = state.build_hash();
  slot->rank_count = static_cast<int32_t>(state.rank_count());
  slot->kv_blocks = static_cast<int32_t>(state.kv_blocks());
  slot->load_bytes_done = static_cast<int64_t>(state.load_bytes_done());
  slot->load_bytes_total = static_cast<int64_t>(state.load_bytes_total());
  stats->up.Set(state.up() ? 1 : 0);
  // Last: whoever sees the phase sees the rest.
  const auto phase = static_cast<RankPhase>(state.phase());
  if (phase > slot->phase.load()) slot->phase.store(phase, std::memory_order_release);
}

}  // namespace

GroupEnd EndBecauseOf(int32_t machine, uint32_t exit_code, std::string_view reason) {
  const bool says_why = exit_code >= kExitConfiguration && exit_code <= kExitDeviceFault;
  return {.exit_code = says_why ? static_cast<int>(exit_code) : int{kExitRankLost},
          .reason = absl::StrCat("machine ", machine, ": ",
                                 absl::string_view(reason.data(), reason.size()))};
}

void AddRanks(const GroupControl& control, const step::GroupStats& stats, RankRange ranks,
              worker::v1::Beat* beat) {
  for (int32_t rank = ranks.first; rank < ranks.first + ranks.count; ++rank) {
    const RankSlot& slot = control.ranks[static_cast<size_t>(rank)];
    worker::v1::RankState* state = beat->add_ranks();
    // First: what it promises was written before it.
    state->set_phase(static_cast<uint32_t>(slot.phase.load(std::memory_order_acquire)));
    state->set_rank(static_cast<uint32_t>(rank));
    state->set_up(stats.ranks[static_cast<size_t>(rank)].up.Get() != 0);
    state->set_model_hash(slot.model_hash);
    state->set_config_hash(slot.config_hash);
    state->set_build_hash(slot.build_hash);
    state->set_rank_count(static_cast<uint32_t>(slot.rank_count.load()));
    state->set_kv_blocks(static_cast<uint32_t>(slot.kv_blocks.load()));
    state->set_load_bytes_done(static_cast<uint64_t>(slot.load_bytes_done.load()));
    state->set_load_bytes_total(static_cast<uint64_t>(slot.load_bytes_total.load()));
  }
}

absl::Status ApplyRanks(const worker::v1::Beat& beat, RankRange allowed, GroupControl* control,
                        step::GroupStats* stats) {
  for (const worker::v1::RankState& state : beat.ranks()) {
    if (Sensible(state, allowed)) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("a machine speaks of rank ", state.rank(), ", which it may not, or nonsense"));
  }
  for (const worker::v1::RankState& state : beat.ranks()) {
    Apply(state, &control->ranks[state.rank()], &stats->ranks[state.rank()]);
  }
  return absl::OkStatus();
}

void FillFacts(const RankFacts& facts, worker::v1::Hello* hello) {
  hello->set_rank_count(static_cast<uint32_t>(facts.rank_count));
  hello->set_model_hash(facts.model_hash);
  hello->set_config_hash(facts.config_hash);
  hello->set_build_hash(facts.build_hash);
}

RankFacts FactsOf(const worker::v1::Hello& hello) {
  return {.model_hash = hello.model_hash(),
          .config_hash = hello.config_hash(),
          .build_hash = hello.build_hash(),
          .rank_count = static_cast<int32_t>(hello.rank_count())};
}

}  // namespace nibble::group
