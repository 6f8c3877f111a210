#include "services/gateway/event_stream.h"

#include <utility>

#include "base/check.h"
#include "services/gateway/status_contract.h"

namespace nibble::gateway {

EventStream::EventStream(Core* core, Rpc rpc, grpc::CallbackServerContext* context)
    : CallBase(core, rpc, context),
      generation_(std::make_shared<Generation>(GenerationOptions{.core = core,
                                                                 .sink = this,
                                                                 .rpc = rpc,
                                                                 .streaming = true,
                                                                 .arrived = arrived(),
                                                                 .deadline = deadline()})) {}

void EventStream::Start(const grpc::ByteBuffer& bytes) {
  absl::Status status = Enter();
  if (status.ok()) {
    auto input = Parse(bytes);
    if (input.ok()) return generation_->Begin(*std::move(input), caller());
    status = input.status();
  }
  generation_->Refuse(status);
}

void EventStream::OnStarted(const std::string& request_id, inference::v1::Started started) {
  {
    absl::MutexLock lock(&mutex_);
    request_id_ = request_id;
  }
  Push(std::move(started));
}

absl::Status EventStream::OnDelta(inference::v1::Delta delta) {
  Push(std::move(delta));
  return absl::OkStatus();
}

void EventStream::OnFinished(inference::v1::Finished finished) { Push(std::move(finished)); }

void EventStream::Push(StreamEvent event) {
  absl::MutexLock lock(&mutex_);
  queue_.Push(std::move(event));
  if (!writing_) WriteNext();
  CountBuffered();
}

// REQUIRES: no write is under way.
void EventStream::WriteNext() {
  const size_t before = queue_.bytes();
  auto event = queue_.Pop();
  if (!event.has_value()) return;
  writing_bytes_ = before - queue_.bytes();
  write_ = Encode(request_id_, *std::move(event));
  writing_ = true;
  write_began_ = core().clock->Now();
  StartWrite(&write_);
}

bool EventStream::Full() {
  absl::MutexLock lock(&mutex_);
  full_ = full_ || Buffered() >= core().limits.stream_buffer_bytes;
  return full_;
}

void EventStream::CountBuffered() {
  const size_t now = Buffered();
  core().metrics.stream_buffered_bytes->Increment(static_cast<double>(now) -
                                                  static_cast<double>(counted_bytes_));
  counted_bytes_ = now;
}

void EventStream::OnWriteDone(bool ok) {
  bool resume = false;
  {
    absl::MutexLock lock(&mutex_);
    writing_ = false;
    writing_bytes_ = 0;
    write_.Clear();
    if (!ok) queue_.Clear();  // the client has left; OnCancel says so
    WriteNext();
    resume = full_ && Buffered() < core().limits.stream_buffer_bytes / 2;
    if (resume) full_ = false;
    CountBuffered();
    FinishIfFlushed();
  }
  if (resume) generation_->Resume();
}

void EventStream::OnEnd(GenerationEnd end) {
  absl::MutexLock lock(&mutex_);
  CHECK(!end_.has_value());
  if (end.abandon) {
    queue_.Clear();
    // A write that nobody reads must not keep the status back.
    if (writing_) Reset(end.status);
  }
  end_ = std::move(end);
  CountBuffered();
  FinishIfFlushed();
}

void EventStream::FinishIfFlushed() {
  if (closed_ || !end_.has_value() || writing_ || !queue_.empty()) return;
  closed_ = true;
  Finish(Close(*end_));
}

void EventStream::OnCancel() {
  const bool late = LeftAtDeadline();
  const absl::Status status = late ? DeadlineError() : CancelledError();
  generation_->Stop(status, late ? CancelledBy::kDeadline : CancelledBy::kClient,
                    /*flush=*/false);
  // The generation may have ended before, with events that still waited.
  absl::MutexLock lock(&mutex_);
  if (!closed_ && end_->status.ok()) end_->status = status;
  queue_.Clear();
  CountBuffered();
  FinishIfFlushed();
}

void EventStream::Sweep(Deadline now) {
  absl::Status status;
  {
    absl::MutexLock lock(&mutex_);
    const Duration stalled = now - write_began_;
    if (!writing_ || closed_ || stalled < core().limits.stall_timeout) return;
    status = SlowReaderError(stalled);
  }
  // First the generation, so that the reset is not taken for the client's own cancel.
  generation_->Stop(status, CancelledBy::kServer, /*flush=*/false);
  absl::MutexLock lock(&mutex_);
  if (!writing_ || closed_) return;
  end_->status = status;  // it may have ended well before, with events that still waited
  queue_.Clear();
  Reset(status);
}

void EventStream::Cut(const absl::Status& status) {
  generation_->Stop(status, CancelledBy::kServer, /*flush=*/true);
}

void EventStream::OnDone() {
  Leave();
  {
    absl::MutexLock lock(&mutex_);
    queue_.Clear();
    writing_bytes_ = 0;
    CountBuffered();
  }
  delete this;
}

}  // namespace nibble::gateway
