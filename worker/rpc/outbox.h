// Takes the writing of responses off the engine thread: a gRPC write costs a serialization and
// often a system call, the engine only notes that a stream has something to send.
#pragma once

#include <memory>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace nibble::rpc {

// A stream that may have something to send.
class OutboxEntry {
 public:
  virtual ~OutboxEntry() = default;
  // Called on the outbox's thread. Must not block.
  virtual void SendPending() = 0;
};

// Thread-safe. One thread works off what was added, in order. An entry adds itself at most once
// until its SendPending(), so the queue is bounded by the number of streams.
class Outbox {
 public:
  Outbox();
  // Sends what was added before, then ends the thread.
  ~Outbox();
  Outbox(const Outbox&) = delete;
  Outbox& operator=(const Outbox&) = delete;

  // Shared: an entry may be finished and dropped by its client while it waits here.
  void Add(std::shared_ptr<OutboxEntry> entry);

 private:
  void Work();

  absl::Mutex mutex_;
  std::vector<std::shared_ptr<OutboxEntry>> waiting_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace nibble::rpc
