#include "services/gateway/stop_matcher.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace nibble::gateway {

StopMatcher::StopMatcher(std::vector<std::string> stops, bool include_stop)
    : stops_(std::move(stops)), include_stop_(include_stop) {
  for (const std::string& stop : stops_) {
    CHECK(!stop.empty());
    longest_ = std::max(longest_, stop.size());
    is_first_[static_cast<unsigned char>(stop.front())] = true;
    is_last_[static_cast<unsigned char>(stop.back())] = true;
  }
}

std::optional<StopMatcher::Match> StopMatcher::FindFirstEnd(size_t from) const {
  const std::string_view text = held_;
  for (size_t end = from + 1; end <= text.size(); ++end) {
    if (!is_last_[static_cast<unsigned char>(text[end - 1])]) continue;
    std::optional<Match> best;
    for (size_t i = 0; i < stops_.size(); ++i) {
      const std::string& stop = stops_[i];
      if (!text.substr(0, end).ends_with(stop)) continue;
      const size_t begin = end - stop.size();
      if (!best.has_value() || begin < best->begin) best = Match{i, begin, end};
    }
    if (best.has_value()) return best;
  }
  return std::nullopt;
}

// Where the longest suffix begins that is a proper prefix of some stop string.
size_t StopMatcher::HeldFrom() const {
  const std::string_view text = held_;
  size_t begin = text.size() < longest_ ? 0 : text.size() - longest_ + 1;
  for (; begin < text.size(); ++begin) {
    if (!is_first_[static_cast<unsigned char>(text[begin])]) continue;
    const std::string_view suffix = text.substr(begin);
    for (const std::string& stop : stops_) {
      if (suffix.size() < stop.size() && stop.starts_with(suffix)) return begin;
    }
  }
  return text.size();
}

StopMatcher::Result StopMatcher::Push(std::string_view piece) {
  if (stops_.empty()) return {std::string(piece), std::nullopt};
  const size_t searched = held_.size();
  held_.append(piece);
  Result result;
  if (const auto match = FindFirstEnd(searched)) {
    result.match = match->stop;
    result.text = held_.substr(0, include_stop_ ? match->end : match->begin);
    held_.clear();
    return result;
  }
  const size_t keep = HeldFrom();
  result.text = held_.substr(0, keep);
  held_.erase(0, keep);
  return result;
}

std::string StopMatcher::Flush() { return std::exchange(held_, {}); }

}  // namespace nibble::gateway
