#include "worker/engine/inbox.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace nibble::engine {

absl::Status Inbox::QueueFull(const std::string& what) const {
  stats_->rejected[step::kQueueFull].Add();
  return absl::ResourceExhaustedError(absl::StrCat("queue is full: ", what));
}

absl::Status Inbox::CheckRoom(const std::string& tenant, int64_t prompt_tokens) const {
  if (closed_) {
    stats_->rejected[step::kDrainingReject].Add();
    return absl::UnavailableError(close_reason_);
  }
  if (waiting_ >= limits_.queue_size) {
    return QueueFull(absl::StrCat(waiting_, " requests wait; limit is ", limits_.queue_size));
  }
  if (waiting_ > 0 && waiting_prompt_tokens_ + prompt_tokens > limits_.queue_prompt_tokens) {
    return QueueFull(absl::StrCat(waiting_prompt_tokens_, " prompt tokens wait; limit is ",
                                  limits_.queue_prompt_tokens));
  }
  const auto own = tenants_.find(tenant);
  if (own == tenants_.end()) return absl::OkStatus();
  const int64_t requests = limits_.tenant_share * int64_t{limits_.queue_size - waiting_};
  if (own->second.requests >= requests) {
    return QueueFull(absl::StrCat("the tenant has ", own->second.requests, " of ", waiting_,
                                  " requests that wait"));
  }
  const int64_t tokens =
      limits_.tenant_share * (limits_.queue_prompt_tokens - waiting_prompt_tokens_);
  if (own->second.prompt_tokens + prompt_tokens > tokens) {
    return QueueFull(absl::StrCat("the tenant has ", own->second.prompt_tokens, " of ",
                                  waiting_prompt_tokens_, " prompt tokens that wait"));
  }
  return absl::OkStatus();
}

RequestId Inbox::NewId() {
  if (free_places_.empty()) {
    free_places_.push_back(static_cast<uint32_t>(places_.size()));
    places_.emplace_back();
  }
  const uint32_t index = free_places_.back();
  free_places_.pop_back();
  Place& place = places_[index];
  ++place.generation;
  place.live = true;
  place.cancelled = false;
  return (RequestId{place.generation} << 32) | index;
}

void Inbox::SetGauges() {
  stats_->requests_waiting.Set(waiting_);
  stats_->waiting_prompt_tokens.Set(waiting_prompt_tokens_);
}

absl::StatusOr<RequestId> Inbox::Submit(Request request, std::shared_ptr<Sink> sink, Deadline now) {
  const auto prompt_tokens = static_cast<int64_t>(request.prompt.size());
  RequestId id = 0;
  {
    const std::lock_guard lock(mutex_);
    absl::Status room = CheckRoom(request.tenant, prompt_tokens);
    if (!room.ok()) return room;
    id = NewId();
    ++waiting_;
    waiting_prompt_tokens_ += prompt_tokens;
    Place& place = places_[PlaceOf(id)];
    place.tenant = request.tenant;
    place.prompt_tokens = prompt_tokens;
    if (!place.tenant.empty()) {
      Waiting& own = tenants_[place.tenant];
      ++own.requests;
      own.prompt_tokens += prompt_tokens;
    }
    SetGauges();
    submissions_.push_back(
        {.id = id, .request = std::move(request), .sink = std::move(sink), .submitted = now});
  }
  work_.notify_one();
  return id;
}

void Inbox::Cancel(RequestId id) {
  {
    const std::lock_guard lock(mutex_);
    if (PlaceOf(id) >= places_.size()) return;
    Place& place = places_[PlaceOf(id)];
    // Once per request, which bounds the list.
    if (!place.live || place.generation != static_cast<uint32_t>(id >> 32) || place.cancelled) {
      return;
    }
    place.cancelled = true;
    cancels_.push_back(id);
  }
  work_.notify_one();
}

void Inbox::Close(std::string reason) {
  const std::lock_guard lock(mutex_);
  closed_ = true;
  close_reason_ = std::move(reason);
}

void Inbox::Stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_.store(true, std::memory_order_relaxed);
  }
  work_.notify_one();
}

void Inbox::Take(std::vector<Submission>* submissions, std::vector<RequestId>* cancels) {
  submissions->clear();
  cancels->clear();
  const std::lock_guard lock(mutex_);
  submissions->swap(submissions_);
  cancels->swap(cancels_);
}

void Inbox::WaitForWork() {
  std::unique_lock lock(mutex_);
  work_.wait(lock, [this] { return stopping() || !submissions_.empty() || !cancels_.empty(); });
}

void Inbox::LeaveQueue(const std::vector<RequestId>& ids) {
  const std::lock_guard lock(mutex_);
  for (const RequestId id : ids) {
    const Place& place = places_[PlaceOf(id)];
    CHECK(place.live && place.generation == static_cast<uint32_t>(id >> 32));
    --waiting_;
    waiting_prompt_tokens_ -= place.prompt_tokens;
    if (place.tenant.empty()) continue;
    const auto own = tenants_.find(place.tenant);
    own->second.prompt_tokens -= place.prompt_tokens;
    if (--own->second.requests == 0) tenants_.erase(own);
  }
  CHECK(waiting_ >= 0 && waiting_prompt_tokens_ >= 0);
  SetGauges();
}

void Inbox::Release(const std::vector<RequestId>& ids) {
  const std::lock_guard lock(mutex_);
  for (const RequestId id : ids) {
    Place& place = places_[PlaceOf(id)];
    CHECK(place.live && place.generation == static_cast<uint32_t>(id >> 32));
    place.live = false;
    free_places_.push_back(PlaceOf(id));
  }
}

}  // namespace nibble::engine
