// Finds stop strings in text that arrives in pieces, without ever handing out a part of one.
#pragma once

#include <array>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace nibble::gateway {

// The match is the one that ends first, byte by byte; of several that end together the longest,
// so the result does not depend on how the text was cut. One thread.
class StopMatcher {
 public:
  // `stops` holds no empty string. Each is valid UTF-8, as is each piece: then so is each result.
  StopMatcher(std::vector<std::string> stops, bool include_stop);

  struct Result {
    std::string text;             // may be delivered now
    std::optional<size_t> match;  // index of the stop string; nothing may be pushed after it
  };
  // REQUIRES: no match yet.
  [[nodiscard]] Result Push(std::string_view piece);
  // What is held back; it turned out to be no stop string.
  [[nodiscard]] std::string Flush();

  [[nodiscard]] size_t held_bytes() const { return held_.size(); }

 private:
  struct Match {
    size_t stop;   // index
    size_t begin;  // in held_
    size_t end;
  };
  [[nodiscard]] std::optional<Match> FindFirstEnd(size_t from) const;
  [[nodiscard]] size_t HeldFrom() const;

  std::vector<std::string> stops_;
  bool include_stop_;
  size_t longest_ = 0;
  std::array<bool, 256> is_first_{};  // bytes that a stop string begins with
  std::array<bool, 256> is_last_{};   // bytes that a stop string ends with
  std::string held_;                  // a proper prefix of some stop string, or empty
};

}  // namespace nibble::gateway
