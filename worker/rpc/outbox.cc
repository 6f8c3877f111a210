#include "worker/rpc/outbox.h"

#include <utility>

namespace nibble::rpc {

Outbox::Outbox() : thread_([this] { Work(); }) {}

Outbox::~Outbox() {
  {
    const absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  thread_.join();
}

void Outbox::Add(std::shared_ptr<OutboxEntry> entry) {
  const absl::MutexLock lock(&mutex_);
  waiting_.push_back(std::move(entry));
}

void Outbox::Work() {
  // Swapped with waiting_, so that both keep their capacity and a warm engine does not allocate.
  std::vector<std::shared_ptr<OutboxEntry>> batch;
  const auto any = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return stopping_ || !waiting_.empty();
  };
  for (;;) {
    {
      const absl::MutexLock lock(&mutex_);
      mutex_.Await(absl::Condition(&any));
      if (waiting_.empty()) return;
      std::swap(batch, waiting_);
    }
    for (const auto& entry : batch) entry->SendPending();
    batch.clear();
  }
}

}  // namespace nibble::rpc
