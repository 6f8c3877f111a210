// Which worker groups there are, what they serve, and which one takes the next request.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "base/clock.h"
#include "nibble/worker/v1/worker.pb.h"
#include "services/gateway/served_model.h"

namespace nibble::gateway {

struct RouterOptions {
  Duration stale = std::chrono::seconds(3);         // without a beat for longer: not ready
  int beats_to_enter = 2;                           // good ones in a row; one bad one leaves
  int breaker_failures = 5;                         // group-level, in a row
  Duration breaker_open = std::chrono::seconds(5);  // doubles with every reopening
  Duration breaker_open_max = std::chrono::seconds(60);
  int breaker_successes = 2;  // after that: closed again
};

enum class BreakerState { kClosed, kHalfOpen, kOpen };

// Sequences are choices: a request with n = 4 counts four.
struct GroupSnapshot {
  std::string name;     // "g0": what clients and metrics see
  std::string address;  // for operators only
  std::string model;    // empty until the group has said
  worker::v1::GetModelInfoResponse info;
  worker::v1::Load load;
  bool ready = false;
  bool connected = false;
  uint32_t in_flight = 0;
  BreakerState breaker = BreakerState::kClosed;
};

struct Resolution {
  enum class Outcome {
    kFound,
    kUnknown,    // every group has said what it serves, and it is not this
    kAmbiguous,  // no name given, several models served
    kNotYet,     // a group that has not reported yet may serve it
  };
  Outcome outcome = Outcome::kNotYet;
  std::shared_ptr<const ServedModel> model;  // set where found
};

// Thread-safe; never blocks for long. Groups are numbered as they were configured.
class Router {
 public:
  Router(const std::vector<std::string>& addresses, const RouterOptions& options,
         const Clock* clock);

  // From a group's link. ---------------------------------------------------------------------
  // FAILED_PRECONDITION when another connected group serves the same model name with other
  // hashes: that group is not used.
  [[nodiscard]] absl::Status Connected(size_t group, std::shared_ptr<const ServedModel> model);
  void Beat(size_t group, const worker::v1::Load& load);
  void Lost(size_t group);
  // A model whose tokenizer and defaults have this hash, to spare fetching them again.
  [[nodiscard]] std::shared_ptr<const ServedModel> WithTokenizer(std::string_view hash) const;

  // For requests. ----------------------------------------------------------------------------
  [[nodiscard]] Resolution Resolve(std::string_view name) const;
  // The least loaded ready group that serves exactly `model`; the caller owes one Release.
  // Groups with an open breaker are taken only when there is no other.
  [[nodiscard]] std::optional<size_t> Pick(const ServedModel& model, uint32_t sequences,
                                           std::optional<size_t> excluded);
  void Release(size_t group, uint32_t sequences);
  // Whether every ready group of the model is known to have all of its slots and its whole queue
  // taken: by what we have sent there and have not had back, and by its last beat. Then how many
  // requests they take. What other gateways sent since that beat is not known here: the leader
  // refuses what this lets through.
  [[nodiscard]] std::optional<int64_t> Full(const ServedModel& model) const;
  // The group has refused a request because it drains: it gets none until its beats say otherwise.
  void Leaving(size_t group);
  // How an attempt ended, as far as it says anything about the group.
  void RecordOutcome(size_t group, bool group_failed);

  [[nodiscard]] bool AnyReady() const;
  [[nodiscard]] std::vector<GroupSnapshot> Snapshot() const;
  [[nodiscard]] const std::string& group_name(size_t group) const { return names_[group]; }
  [[nodiscard]] size_t group_count() const { return names_.size(); }

 private:
  struct Group {
    std::string address;
    std::shared_ptr<const ServedModel> model;  // last one told
    bool connected = false;
    worker::v1::Load load;
    Deadline last_beat;
    int good_beats = 0;
    uint32_t in_flight = 0;
    uint32_t sent_since_beat = 0;  // what the last beat cannot know of
    int failures = 0;
    int successes = 0;
    bool breaker_tripped = false;
    Duration breaker_for{};
    Deadline breaker_until;
  };

  [[nodiscard]] bool IsReady(const Group& group) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  [[nodiscard]] BreakerState Breaker(const Group& group) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void TripBreaker(Group* group) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const RouterOptions options_;
  const Clock* const clock_;
  std::vector<std::string> names_;
  mutable absl::Mutex mutex_;
  std::vector<Group> groups_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace nibble::gateway
