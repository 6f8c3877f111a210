#include "services/gateway/stop_matcher.h"

#include <gtest/gtest.h>

#include <optional>
#include <string>
#include <vector>

namespace nibble::gateway {
namespace {

struct Expected {
  std::string text;
  std::optional<size_t> match;
};

// The definition, on the whole text: the match that ends first, the longest of those.
Expected Reference(const std::string& text, const std::vector<std::string>& stops,
                   bool include_stop) {
  for (size_t end = 1; end <= text.size(); ++end) {
    std::optional<size_t> best;
    for (size_t i = 0; i < stops.size(); ++i) {
      if (!text.substr(0, end).ends_with(stops[i])) continue;
      if (!best.has_value() || stops[i].size() > stops[*best].size()) best = i;
    }
    if (best.has_value()) {
      return {text.substr(0, include_stop ? end : end - stops[*best].size()), best};
    }
  }
  return {text, std::nullopt};
}

// Feeds `text` cut at the set bits of `cuts`; checks after every piece that nothing was delivered
// that a stop string, complete later, would have taken back.
void CheckSplit(const std::string& text, const std::vector<std::string>& stops, bool include_stop,
                uint32_t cuts) {
  const Expected expected = Reference(text, stops, include_stop);
  StopMatcher matcher(stops, include_stop);
  std::string delivered;
  std::optional<size_t> match;
  std::string piece;
  for (size_t i = 0; i < text.size() && !match.has_value(); ++i) {
    piece += text[i];
    if ((cuts >> i & 1) == 0 && i + 1 < text.size()) continue;
    StopMatcher::Result result = matcher.Push(piece);
    piece.clear();
    delivered += result.text;
    match = result.match;
    ASSERT_TRUE(expected.text.starts_with(delivered))
        << "delivered \"" << delivered << "\" of \"" << expected.text << "\"";
  }
  if (!match.has_value()) delivered += matcher.Flush();
  EXPECT_EQ(delivered, expected.text) << text << " cuts " << cuts;
  EXPECT_EQ(match, expected.match) << text << " cuts " << cuts;
}

TEST(StopMatcher, EverySplitOfEveryShortTextGivesTheReference) {
  const std::vector<std::vector<std::string>> stop_sets = {{"ab"},
                                                           {"aab"},
                                                           {"aba"},
                                                           {"a"},
                                                           {"ab", "b"},
                                                           {"ba", "aba"},
                                                           {"aab", "ba"},
                                                           {"bb", "abab"},
                                                           {"abb", "bba", "aa"},
                                                           {"b", "bb", "bbb"},
                                                           {"abc", "bcd", "cc"}};
  for (const auto& stops : stop_sets) {
    const std::string alphabet = stops.size() == 3 && stops[0] == "abc" ? "abcd" : "ab";
    const size_t length = alphabet.size() == 4 ? 5 : 7;
    size_t texts = 1;
    for (size_t i = 0; i < length; ++i) texts *= alphabet.size();
    for (size_t code = 0; code < texts; ++code) {
      std::string text;
      for (size_t i = 0, rest = code; i < length; ++i, rest /= alphabet.size()) {
        text += alphabet[rest % alphabet.size()];
      }
      for (uint32_t cuts = 0; cuts < 1U << (length - 1); ++cuts) {
        CheckSplit(text, stops, code % 2 == 0, cuts);
        if (HasFailure()) return;
      }
    }
  }
}

TEST(StopMatcher, HoldsBackNoMoreThanAPossibleStart) {
  StopMatcher matcher({"END"}, false);
  EXPECT_EQ(matcher.Push("the E").text, "the ");
  EXPECT_EQ(matcher.held_bytes(), 1U);
  EXPECT_EQ(matcher.Push("N").text, "");
  EXPECT_EQ(matcher.Push("EN").text, "EN");
  EXPECT_EQ(matcher.held_bytes(), 2U);
  EXPECT_EQ(matcher.Flush(), "EN");
}

TEST(StopMatcher, ResultsAreWholeCharacters) {
  StopMatcher matcher({"\u00e9\u00e8"}, false);
  EXPECT_EQ(matcher.Push("x\u00e9").text, "x");
  EXPECT_EQ(matcher.Push("\u00e9").text, "\u00e9");
  const StopMatcher::Result result = matcher.Push("\u00e8 more");
  EXPECT_EQ(result.text, "");
  EXPECT_EQ(result.match, 0U);
}

TEST(StopMatcher, WithoutStopsEverythingPasses) {
  StopMatcher matcher({}, false);
  EXPECT_EQ(matcher.Push("anything").text, "anything");
  EXPECT_EQ(matcher.Flush(), "");
}

TEST(StopMatcher, IncludesTheStopStringWhereAsked) {
  StopMatcher matcher({"\n\n"}, true);
  EXPECT_EQ(matcher.Push("one\n").text, "one");
  const StopMatcher::Result result = matcher.Push("\ntwo");
  EXPECT_EQ(result.text, "\n\n");
  EXPECT_EQ(result.match, 0U);
}

}  // namespace
}  // namespace nibble::gateway
