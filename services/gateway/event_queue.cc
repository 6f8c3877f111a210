#include "services/gateway/event_queue.h"

#include <utility>

namespace nibble::gateway {

namespace pb = inference::v1;

namespace {

constexpr size_t kFixedBytes = 24;  // tags, lengths, request id's share
constexpr size_t kIdBytes = 4;
constexpr size_t kLogprobBytes = 20;  // id, float, the token's bytes

}  // namespace

size_t EventQueue::BytesOf(const StreamEvent& event) {
  if (const auto* delta = std::get_if<pb::Delta>(&event)) {
    size_t bytes = kFixedBytes + delta->text().size() +
                   kIdBytes * static_cast<size_t>(delta->token_ids_size());
    for (const pb::TokenLogprobs& logprobs : delta->logprobs()) {
      bytes += kLogprobBytes * static_cast<size_t>(1 + logprobs.top_size());
    }
    return bytes;
  }
  if (const auto* started = std::get_if<pb::Started>(&event)) return started->ByteSizeLong();
  return std::get<pb::Finished>(event).ByteSizeLong();
}

bool EventQueue::Merge(pb::Delta* delta, size_t bytes) {
  for (auto entry = entries_.rbegin(); entry != entries_.rend(); ++entry) {
    auto* waiting = std::get_if<pb::Delta>(&entry->event);
    if (waiting == nullptr || waiting->index() != delta->index()) continue;
    if (entry->bytes + bytes > kDeltaBytes) return false;
    waiting->mutable_text()->append(delta->text());
    waiting->mutable_token_ids()->MergeFrom(delta->token_ids());
    for (pb::TokenLogprobs& logprobs : *delta->mutable_logprobs()) {
      *waiting->add_logprobs() = std::move(logprobs);
    }
    waiting->set_completion_tokens(delta->completion_tokens());
    entry->bytes += bytes;
    bytes_ += bytes;
    return true;
  }
  return false;
}

void EventQueue::Push(StreamEvent event) {
  const size_t bytes = BytesOf(event);
  auto* delta = std::get_if<pb::Delta>(&event);
  if (delta != nullptr && Merge(delta, bytes)) return;
  bytes_ += bytes;
  entries_.push_back({std::move(event), bytes});
}

std::optional<StreamEvent> EventQueue::Pop() {
  if (entries_.empty()) return std::nullopt;
  StreamEvent event = std::move(entries_.front().event);
  bytes_ -= entries_.front().bytes;
  entries_.pop_front();
  return event;
}

void EventQueue::Clear() {
  entries_.clear();
  bytes_ = 0;
}

}  // namespace nibble::gateway
