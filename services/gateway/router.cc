#include "services/gateway/router.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace nibble::gateway {
namespace {

bool SameModel(const ServedModel& a, const ServedModel& b) {
  return a.name() == b.name() && a.info.model_hash() == b.info.model_hash() &&
         a.info.tokenizer_hash() == b.info.tokenizer_hash();
}

// Sequences per place: groups of different sizes compare.
double LoadOf(uint32_t sequences, const worker::v1::GetModelInfoResponse& info) {
  return static_cast<double>(sequences) / std::max(1U, info.max_sequences());
}

}  // namespace

Router::Router(const std::vector<std::string>& addresses, const RouterOptions& options,
               const Clock* clock)
    : options_(options), clock_(clock), groups_(addresses.size()) {
  for (size_t i = 0; i < addresses.size(); ++i) {
    names_.push_back(absl::StrCat("g", i));
    groups_[i].address = addresses[i];
  }
}

absl::Status Router::Connected(size_t group, std::shared_ptr<const ServedModel> model) {
  absl::MutexLock lock(&mutex_);
  for (size_t i = 0; i < groups_.size(); ++i) {
    const Group& other = groups_[i];
    if (i == group || !other.connected || other.model->name() != model->name()) continue;
    if (SameModel(*other.model, *model)) continue;
    return absl::FailedPreconditionError(
        absl::StrCat("group ", names_[group], " serves model \"", model->name(),
                     "\" with other files than group ", names_[i],
                     " (model or tokenizer hash differs); it is not used"));
  }
  Group& self = groups_[group];
  self.model = std::move(model);
  self.connected = true;
  self.good_beats = 0;
  self.load.Clear();
  return absl::OkStatus();
}

void Router::Beat(size_t group, const worker::v1::Load& load) {
  absl::MutexLock lock(&mutex_);
  Group& self = groups_[group];
  if (!self.connected) return;
  const bool good = load.ready() && !load.draining();
  self.good_beats = good ? std::min(self.good_beats + 1, options_.beats_to_enter) : 0;
  self.load = load;
  self.last_beat = clock_->Now();
  self.sent_since_beat = 0;
}

void Router::Lost(size_t group) {
  absl::MutexLock lock(&mutex_);
  groups_[group].connected = false;
  groups_[group].good_beats = 0;
}

void Router::Leaving(size_t group) {
  absl::MutexLock lock(&mutex_);
  groups_[group].good_beats = 0;
}

std::shared_ptr<const ServedModel> Router::WithTokenizer(std::string_view hash) const {
  absl::MutexLock lock(&mutex_);
  if (hash.empty()) return nullptr;
  for (const Group& group : groups_) {
    if (group.model != nullptr && group.model->info.tokenizer_hash() == hash) return group.model;
  }
  return nullptr;
}

bool Router::IsReady(const Group& group) const {
  return group.connected && group.good_beats >= options_.beats_to_enter &&
         clock_->Now() - group.last_beat <= options_.stale;
}

BreakerState Router::Breaker(const Group& group) const {
  if (!group.breaker_tripped) return BreakerState::kClosed;
  return clock_->Now() < group.breaker_until ? BreakerState::kOpen : BreakerState::kHalfOpen;
}

Resolution Router::Resolve(std::string_view name) const {
  absl::MutexLock lock(&mutex_);
  std::shared_ptr<const ServedModel> found;
  bool found_ready = false;
  bool all_told = !groups_.empty();
  bool ambiguous = false;
  for (const Group& group : groups_) {
    if (group.model == nullptr) {
      all_told = false;
      continue;
    }
    if (!name.empty() && group.model->name() != name) continue;
    if (found != nullptr && found->name() != group.model->name()) ambiguous = true;
    // A group that is gone may have told of files that its model no longer has.
    const bool ready = IsReady(group);
    if (found == nullptr || (ready && !found_ready)) {
      found = group.model;
      found_ready = ready;
    }
  }
  if (ambiguous) return {Resolution::Outcome::kAmbiguous, nullptr};
  if (found != nullptr) return {Resolution::Outcome::kFound, std::move(found)};
  if (name.empty() || !all_told) return {Resolution::Outcome::kNotYet, nullptr};
  return {Resolution::Outcome::kUnknown, nullptr};
}

std::optional<size_t> Router::Pick(const ServedModel& model, uint32_t sequences,
                                   std::optional<size_t> excluded) {
  absl::MutexLock lock(&mutex_);
  std::optional<size_t> best;
  std::pair<double, double> best_load;
  bool best_open = false;
  for (size_t i = 0; i < groups_.size(); ++i) {
    const Group& group = groups_[i];
    if (excluded == i || !IsReady(group) || !SameModel(*group.model, model)) continue;
    const bool open = Breaker(group) == BreakerState::kOpen;
    // Other gateways' requests show in the reported load alone, our own latest ones only here; one
    // that was on its way while the leader looked is in neither sum, and in flight all the same.
    const uint32_t told = group.load.running() + group.load.waiting() + group.sent_since_beat;
    const std::pair<double, double> load = {
        LoadOf(std::max(told, group.in_flight), group.model->info),
        LoadOf(group.in_flight, group.model->info)};
    const bool better =
        !best.has_value() || (best_open && !open) || (best_open == open && load < best_load);
    if (!better) continue;
    best = i;
    best_load = load;
    best_open = open;
  }
  if (best.has_value()) {
    groups_[*best].in_flight += sequences;
    groups_[*best].sent_since_beat += sequences;
  }
  return best;
}

std::optional<int64_t> Router::Full(const ServedModel& model) const {
  absl::MutexLock lock(&mutex_);
  int64_t limit = 0;
  for (const Group& group : groups_) {
    if (!IsReady(group) || !SameModel(*group.model, model)) continue;
    const worker::v1::GetModelInfoResponse& info = group.model->info;
    const int64_t places = int64_t{info.max_sequences()} + info.queue_size();
    const int64_t told =
        int64_t{group.load.running()} + group.load.waiting() + group.sent_since_beat;
    // In flight is also what a slow reader keeps after its group is done with it, hence both.
    if (info.queue_size() == 0 || std::min<int64_t>(told, group.in_flight) < places) {
      return std::nullopt;
    }
    limit += places;
  }
  if (limit == 0) return std::nullopt;
  return limit;
}

void Router::Release(size_t group, uint32_t sequences) {
  absl::MutexLock lock(&mutex_);
  CHECK(groups_[group].in_flight >= sequences);
  groups_[group].in_flight -= sequences;
}

void Router::TripBreaker(Group* group) {
  group->breaker_for = group->breaker_tripped
                           ? std::min(group->breaker_for * 2, options_.breaker_open_max)
                           : options_.breaker_open;
  group->breaker_tripped = true;
  group->breaker_until = clock_->Now() + group->breaker_for;
  group->successes = 0;
  group->failures = 0;
}

void Router::RecordOutcome(size_t group, bool group_failed) {
  absl::MutexLock lock(&mutex_);
  Group& self = groups_[group];
  const BreakerState state = Breaker(self);
  if (group_failed) {
    self.successes = 0;
    // While it is open, failures are those of requests sent before it tripped.
    if (state == BreakerState::kOpen) return;
    if (state == BreakerState::kHalfOpen || ++self.failures >= options_.breaker_failures) {
      TripBreaker(&self);
    }
    return;
  }
  self.failures = 0;
  if (self.breaker_tripped && ++self.successes >= options_.breaker_successes) {
    self.breaker_tripped = false;
    self.successes = 0;
  }
}

bool Router::AnyReady() const {
  absl::MutexLock lock(&mutex_);
  return std::any_of(groups_.begin(), groups_.end(), [&](const Group& group) {
    mutex_.AssertHeld();
    return IsReady(group);
  });
}

std::vector<GroupSnapshot> Router::Snapshot() const {
  absl::MutexLock lock(&mutex_);
  std::vector<GroupSnapshot> snapshots;
  for (size_t i = 0; i < groups_.size(); ++i) {
    const Group& group = groups_[i];
    GroupSnapshot& snapshot = snapshots.emplace_back();
    snapshot.name = names_[i];
    snapshot.address = group.address;
    if (group.model != nullptr) {
      snapshot.model = group.model->name();
      snapshot.info = group.model->info;
    }
    snapshot.load = group.load;
    snapshot.ready = IsReady(group);
    snapshot.connected = group.connected;
    snapshot.in_flight = group.in_flight;
    snapshot.breaker = Breaker(group);
  }
  return snapshots;
}

}  // namespace nibble::gateway
