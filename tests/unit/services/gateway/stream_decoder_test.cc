#include "services/gateway/stream_decoder.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/unit/services/gateway/byte_tokenizer.h"

namespace nibble::gateway {
namespace {

using End = StreamDecoder::End;

struct Outcome {
  std::string text;
  End end = End::kNone;
  int32_t tokens = 0;
};

Outcome Decode(DecoderOptions options, const std::vector<int32_t>& ids) {
  const ByteTokenizer tokenizer;
  StreamDecoder decoder(tokenizer, std::move(options));
  Outcome outcome;
  for (const int32_t id : ids) {
    outcome.end = *decoder.Push(id, &outcome.text);
    if (outcome.end != End::kNone) break;
  }
  if (outcome.end == End::kNone) outcome.end = *decoder.Finish(&outcome.text);
  outcome.tokens = decoder.token_count();
  return outcome;
}

std::vector<int32_t> Ids(const std::string& text, std::vector<int32_t> more = {}) {
  std::vector<int32_t> ids = ByteTokenizer::Ids(text);
  ids.insert(ids.end(), more.begin(), more.end());
  return ids;
}

TEST(StreamDecoder, StopIdEndsWithoutItsText) {
  const Outcome outcome = Decode({.stop_ids = {kByteEos}}, Ids("hi", {kByteEos}));
  EXPECT_EQ(outcome.text, "hi");
  EXPECT_EQ(outcome.end, End::kStopId);
  EXPECT_EQ(outcome.tokens, 3);
}

TEST(StreamDecoder, StopIdsTextStaysWhereAsked) {
  const Outcome outcome =
      Decode({.skip_special_tokens = false, .include_stop = true, .stop_ids = {kByteEos, 'x'}},
             Ids("hi", {kByteEos}));
  EXPECT_EQ(outcome.text, "hi</s>");
  EXPECT_EQ(Decode({.include_stop = true, .stop_ids = {'x'}}, Ids("hix")).text, "hix");
  EXPECT_EQ(Decode({.stop_ids = {'x'}}, Ids("hix")).text, "hi");
}

TEST(StreamDecoder, StopStringAcrossTokensIsNeverPartlyShown) {
  const ByteTokenizer tokenizer;
  StreamDecoder decoder(tokenizer, {.stops = {"END"}});
  std::string text;
  for (const char c : std::string("the EN")) {
    EXPECT_EQ(*decoder.Push(c, &text), End::kNone);
    EXPECT_EQ(text.find('E'), std::string::npos);
  }
  EXPECT_EQ(*decoder.Push('D', &text), End::kStopString);
  EXPECT_EQ(text, "the ");
  EXPECT_EQ(decoder.matched_stop(), "END");
}

TEST(StreamDecoder, HeldTextComesOutAtTheEnd) {
  EXPECT_EQ(Decode({.stops = {"END"}}, Ids("the EN")).text, "the EN");
  EXPECT_EQ(Decode({.stops = {"END"}, .stop_ids = {kByteEos}}, Ids("EN", {kByteEos})).text, "EN");
}

TEST(StreamDecoder, StopStringsCountOnlyFromMinTokensOn) {
  const Outcome outcome = Decode({.stops = {"ab"}, .min_tokens = 4}, Ids("abab!ab?"));
  // The fourth token is the first whose text may end the answer, and "ab" needs two.
  EXPECT_EQ(outcome.text, "abab!");
  EXPECT_EQ(outcome.end, End::kStopString);
  EXPECT_EQ(outcome.tokens, 7);
}

TEST(StreamDecoder, WithoutTextStopsStillWork) {
  const Outcome outcome = Decode({.text = false, .stops = {"b"}}, Ids("abc"));
  EXPECT_EQ(outcome.text, "");
  EXPECT_EQ(outcome.end, End::kStopString);
  EXPECT_EQ(Decode({.text = false, .stop_ids = {'b'}}, Ids("abc")).end, End::kStopId);
}

TEST(StreamDecoder, CutCharacterAtTheEndBecomesTheReplacement) {
  EXPECT_EQ(Decode({}, {'a', 0xC3}).text, "a\uFFFD");
  EXPECT_EQ(Decode({}, {'a', 0xC3, 0xA9}).text, "a\u00e9");
}

TEST(StreamDecoder, ContinuesACharacterThatThePromptBegan) {
  EXPECT_EQ(Decode({.before = {'x', 0xC3}}, {0xA9, '!'}).text, "\u00e9!");
}

TEST(StreamDecoder, StopStringMayEndInTheReplacement) {
  const Outcome outcome = Decode({.stops = {"\uFFFD"}}, {'a', 0xC3});
  EXPECT_EQ(outcome.text, "a");
  EXPECT_EQ(outcome.end, End::kStopString);
}

}  // namespace
}  // namespace nibble::gateway
