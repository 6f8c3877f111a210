// An engine that does nothing of itself: a test plays its thread.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "worker/engine/engine.h"

namespace nibble::rpc {

// Thread-safe. The Await… functions block until the thing has happened; the test's own time limit
// bounds them.
class FakeEngine final : public engine::Engine {
 public:
  struct Submitted {
    engine::Request request;
    std::shared_ptr<engine::Sink> sink;
  };

  absl::StatusOr<engine::RequestId> Submit(engine::Request request,
                                           std::shared_ptr<engine::Sink> sink) override {
    const absl::MutexLock lock(&mutex_);
    if (!refuse_.ok()) return refuse_;
    submitted_.push_back({std::move(request), std::move(sink)});
    return submitted_.size();  // ids from 1 on
  }

  // As the real one: the sequence ends CANCELLED, once.
  void Cancel(engine::RequestId id) override {
    std::shared_ptr<engine::Sink> sink;
    {
      const absl::MutexLock lock(&mutex_);
      cancelled_.push_back(id);
      sink = std::exchange(submitted_[id - 1].sink, nullptr);
    }
    if (sink != nullptr) sink->OnFinished({.status = absl::CancelledError("cancelled")});
  }

  void Drain() override {
    const absl::MutexLock lock(&mutex_);
    load_.draining = true;
  }
  [[nodiscard]] engine::Load GetLoad() const override {
    const absl::MutexLock lock(&mutex_);
    return load_;
  }
  absl::Status Run() override { return absl::OkStatus(); }
  void Stop() override {}
  absl::StatusOr<bool> RunStep() override { return false; }

  void set_load(const engine::Load& load) {
    const absl::MutexLock lock(&mutex_);
    load_ = load;
  }
  void RefuseWith(absl::Status status) {
    const absl::MutexLock lock(&mutex_);
    refuse_ = std::move(status);
  }
  // The sink of request `id`, handed over: the caller is the engine thread now.
  std::shared_ptr<engine::Sink> AwaitSink(engine::RequestId id) {
    const absl::MutexLock lock(&mutex_);
    const auto there = [this, id] { return submitted_.size() >= id; };
    mutex_.Await(absl::Condition(&there));
    return submitted_[id - 1].sink;
  }
  [[nodiscard]] engine::Request request(engine::RequestId id) const {
    const absl::MutexLock lock(&mutex_);
    return submitted_[id - 1].request;
  }
  void AwaitCancelled(engine::RequestId id) {
    const absl::MutexLock lock(&mutex_);
    const auto there = [this, id] {
      return std::find(cancelled_.begin(), cancelled_.end(), id) != cancelled_.end();
    };
    mutex_.Await(absl::Condition(&there));
  }
  [[nodiscard]] size_t cancel_count() const {
    const absl::MutexLock lock(&mutex_);
    return cancelled_.size();
  }

 private:
  mutable absl::Mutex mutex_;
  std::vector<Submitted> submitted_ ABSL_GUARDED_BY(mutex_);
  std::vector<engine::RequestId> cancelled_ ABSL_GUARDED_BY(mutex_);
  absl::Status refuse_ ABSL_GUARDED_BY(mutex_);
  engine::Load load_ ABSL_GUARDED_BY(mutex_){.kv_blocks_total = 100, .ready = true};
};

}  // namespace nibble::rpc
