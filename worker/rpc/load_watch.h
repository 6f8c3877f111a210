// WatchLoad: every watcher gets the group's load pushed, which doubles as the leader's heartbeat.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "nibble/worker/v1/worker.pb.h"

namespace nibble::rpc {

// Thread-safe. A watcher that is behind gets the newest load next, not those in between.
class LoadWatchers {
 public:
  LoadWatchers();
  ~LoadWatchers();  // REQUIRES: every stream is done (the server was shut down)

  // Starts a stream with `now` as its first message. RESOURCE_EXHAUSTED beyond kWatchersMax.
  [[nodiscard]] grpc::ServerWriteReactor<worker::v1::WatchLoadResponse>* Open(
      const worker::v1::Load& now);
  void Push(const worker::v1::Load& load);
  // Ends every stream UNAVAILABLE, present and future: the leader stops.
  void Close();

  static constexpr size_t kWatchersMax = 1024;

 private:
  class Stream;
  void Remove(Stream* stream);

  absl::Mutex mutex_;
  std::vector<std::shared_ptr<Stream>> streams_ ABSL_GUARDED_BY(mutex_);
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace nibble::rpc
