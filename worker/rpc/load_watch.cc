#include "worker/rpc/load_watch.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"

namespace nibble::rpc {

// Held by the list until gRPC is done with it.
class LoadWatchers::Stream final : public grpc::ServerWriteReactor<worker::v1::WatchLoadResponse> {
 public:
  explicit Stream(LoadWatchers* owner) : owner_(owner) {}

  void Push(const worker::v1::Load& load) {
    const absl::MutexLock lock(&mutex_);
    next_ = load;
    Send();
  }

  void End(grpc::Status status) {
    const absl::MutexLock lock(&mutex_);
    EndLocked(std::move(status));
  }

  void OnWriteDone(bool ok) override {
    const absl::MutexLock lock(&mutex_);
    writing_ = false;
    if (ok) return Send();
    EndLocked(grpc::Status::CANCELLED);
  }
  void OnCancel() override { End(grpc::Status::CANCELLED); }
  void OnDone() override { owner_->Remove(this); }

 private:
  void EndLocked(grpc::Status status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (!end_.has_value()) end_ = std::move(status);
    Send();
  }

  // gRPC runs no reaction on the thread that starts an operation, so the lock may be held.
  void Send() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (writing_ || finished_) return;
    if (end_.has_value()) {
      finished_ = true;
      Finish(*end_);
    } else if (next_.has_value()) {
      writing_ = true;
      *message_.mutable_load() = *std::exchange(next_, std::nullopt);
      StartWrite(&message_);
    }
  }

  LoadWatchers* const owner_;
  absl::Mutex mutex_;
  worker::v1::WatchLoadResponse message_ ABSL_GUARDED_BY(mutex_);
  std::optional<worker::v1::Load> next_ ABSL_GUARDED_BY(mutex_);
  std::optional<grpc::Status> end_ ABSL_GUARDED_BY(mutex_);
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
};

LoadWatchers::LoadWatchers() = default;
LoadWatchers::~LoadWatchers() = default;

grpc::ServerWriteReactor<worker::v1::WatchLoadResponse>* LoadWatchers::Open(
    const worker::v1::Load& now) {
  auto stream = std::make_shared<Stream>(this);
  bool closed = false;
  bool full = false;
  {
    const absl::MutexLock lock(&mutex_);
    closed = closed_;
    full = streams_.size() >= kWatchersMax;
    streams_.push_back(stream);
  }
  if (closed) {
    stream->End(grpc::Status(grpc::StatusCode::UNAVAILABLE, "the worker is stopping"));
  } else if (full) {
    stream->End(grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED,
                             absl::StrCat("more than ", kWatchersMax, " load watchers")));
  } else {
    stream->Push(now);
  }
  return stream.get();
}

void LoadWatchers::Push(const worker::v1::Load& load) {
  std::vector<std::shared_ptr<Stream>> streams;
  {
    const absl::MutexLock lock(&mutex_);
    streams = streams_;
  }
  for (const auto& stream : streams) stream->Push(load);
}

void LoadWatchers::Close() {
  std::vector<std::shared_ptr<Stream>> streams;
  {
    const absl::MutexLock lock(&mutex_);
    closed_ = true;
    streams = streams_;
  }
  for (const auto& stream : streams) {
    stream->End(grpc::Status(grpc::StatusCode::UNAVAILABLE, "the worker is stopping"));
  }
}

void LoadWatchers::Remove(Stream* stream) {
  std::shared_ptr<Stream> last;  // destroyed after the lock
  const absl::MutexLock lock(&mutex_);
  const auto found = std::find_if(streams_.begin(), streams_.end(),
                                  [stream](const auto& held) { return held.get() == stream; });
  if (found == streams_.end()) return;
  last = std::move(*found);
  streams_.erase(found);
}

}  // namespace nibble::rpc
