// What waits for one client: events in order, deltas of a choice merged while they wait.
#pragma once

#include <cstddef>
#include <deque>
#include <optional>
#include <string>
#include <variant>

#include "nibble/inference/v1/inference.pb.h"

namespace nibble::gateway {

using StreamEvent =
    std::variant<inference::v1::Started, inference::v1::Delta, inference::v1::Finished>;

// One thread at a time. Its size is about what it costs in memory and on the wire.
class EventQueue {
 public:
  // A delta joins the last waiting one of its choice, until that has kDeltaBytes: a slow reader
  // then sees progress with every few kilobytes, and memory stays bounded by the caller's limit.
  void Push(StreamEvent event);
  [[nodiscard]] std::optional<StreamEvent> Pop();
  void Clear();

  [[nodiscard]] bool empty() const { return entries_.empty(); }
  [[nodiscard]] size_t bytes() const { return bytes_; }
  [[nodiscard]] size_t size() const { return entries_.size(); }

  static constexpr size_t kDeltaBytes = 2048;
  [[nodiscard]] static size_t BytesOf(const StreamEvent& event);

 private:
  struct Entry {
    StreamEvent event;
    size_t bytes;
  };
  [[nodiscard]] bool Merge(inference::v1::Delta* delta, size_t bytes);

  std::deque<Entry> entries_;
  size_t bytes_ = 0;
};

}  // namespace nibble::gateway
