// What other threads want of the engine thread, and the limits on it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "worker/engine/engine.h"
#include "worker/step/group_stats.h"

namespace nibble::engine {

struct Submission {
  RequestId id = 0;
  Request request;
  std::shared_ptr<Sink> sink;  // shared: the edge that made it and the engine both hold it
  Deadline submitted{};
};

// Ids carry a place and its generation: an id that has ended never names a later request.
[[nodiscard]] inline uint32_t PlaceOf(RequestId id) { return static_cast<uint32_t>(id); }

// Any thread, except where it says engine thread. Nothing here calls out with the lock held.
class Inbox {
 public:
  struct Limits {
    int32_t queue_size = 0;           // requests not admitted yet
    int64_t queue_prompt_tokens = 0;  // of those together; a lone request may have more
    // One tenant may have this many times what is left free, of either: it can take four fifths of
    // an empty queue, several together most of it, and whoever has nothing waiting finds room.
    int32_t tenant_share = 4;
  };

  // `stats` outlives the inbox; it writes the gauges of waiting requests and the rejections.
  Inbox(const Limits& limits, step::EngineStats* stats) : limits_(limits), stats_(stats) {}

  // RESOURCE_EXHAUSTED when the queue is full, UNAVAILABLE once closed. On success the request
  // holds its place in the queue until LeaveQueue and its id until Release.
  [[nodiscard]] absl::StatusOr<RequestId> Submit(Request request, std::shared_ptr<Sink> sink,
                                                 Deadline now);
  void Cancel(RequestId id);

  // No request enters after this. Any number of times.
  void Close(std::string reason);
  void Stop();
  [[nodiscard]] bool stopping() const { return stopping_.load(std::memory_order_relaxed); }

  // Engine thread: what has come in since the last call, in order; the vectors are overwritten,
  // and their memory is used again.
  void Take(std::vector<Submission>* submissions, std::vector<RequestId>* cancels);
  // Engine thread: sleeps until there is something to take, or Stop().
  void WaitForWork();
  // Engine thread: requests that were admitted, or ended before that.
  void LeaveQueue(const std::vector<RequestId>& ids);
  // Engine thread: requests that have ended. Their ids mean nothing from here on.
  void Release(const std::vector<RequestId>& ids);

 private:
  struct Place {
    uint32_t generation = 0;
    bool live = false;
    bool cancelled = false;
    std::string tenant;  // empty = nobody in particular
    int64_t prompt_tokens = 0;
  };

  struct Waiting {
    int32_t requests = 0;
    int64_t prompt_tokens = 0;
  };

  [[nodiscard]] absl::Status CheckRoom(const std::string& tenant, int64_t prompt_tokens) const;
  [[nodiscard]] absl::Status QueueFull(const std::string& what) const;
  [[nodiscard]] RequestId NewId();
  void SetGauges();

  const Limits limits_;
  step::EngineStats* const stats_;
  std::atomic<bool> stopping_ = false;

  mutable std::mutex mutex_;
  std::condition_variable work_;
  // All below under mutex_.
  std::vector<Submission> submissions_;
  std::vector<RequestId> cancels_;
  std::vector<Place> places_;
  std::vector<uint32_t> free_places_;
  int32_t waiting_ = 0;
  int64_t waiting_prompt_tokens_ = 0;
  std::unordered_map<std::string, Waiting> tenants_;  // those with anything waiting
  bool closed_ = false;
  std::string close_reason_;
};

}  // namespace nibble::engine
