#include "services/gateway/event_queue.h"

#include <gtest/gtest.h>

#include <string>
#include <utility>

namespace nibble::gateway {
namespace {

namespace pb = inference::v1;

pb::Delta Delta(uint32_t index, const std::string& text, uint32_t total,
                std::vector<uint32_t> ids = {}) {
  pb::Delta delta;
  delta.set_index(index);
  delta.set_text(text);
  delta.set_completion_tokens(total);
  delta.mutable_token_ids()->Add(ids.begin(), ids.end());
  for (size_t i = 0; i < ids.size(); ++i)
    delta.add_logprobs()->mutable_sampled()->set_token_id(ids[i]);
  return delta;
}

TEST(EventQueue, MergesWaitingDeltasOfAChoice) {
  EventQueue queue;
  queue.Push(pb::Started());
  queue.Push(Delta(0, "a", 1, {10}));
  queue.Push(Delta(1, "x", 1));
  queue.Push(Delta(0, "bc", 3, {11, 12}));
  EXPECT_EQ(queue.size(), 3U);
  EXPECT_TRUE(std::holds_alternative<pb::Started>(*queue.Pop()));
  const auto delta = std::get<pb::Delta>(*queue.Pop());
  EXPECT_EQ(delta.index(), 0U);
  EXPECT_EQ(delta.text(), "abc");
  EXPECT_EQ(delta.completion_tokens(), 3U);
  ASSERT_EQ(delta.token_ids_size(), 3);
  EXPECT_EQ(delta.token_ids(2), 12U);
  EXPECT_EQ(delta.logprobs(2).sampled().token_id(), 12U);
  EXPECT_EQ(std::get<pb::Delta>(*queue.Pop()).text(), "x");
  EXPECT_FALSE(queue.Pop().has_value());
  EXPECT_EQ(queue.bytes(), 0U);
}

TEST(EventQueue, KeepsEventsOfAChoiceInOrder) {
  EventQueue queue;
  queue.Push(Delta(0, "a", 1));
  pb::Finished finished;
  finished.set_index(1);
  queue.Push(finished);
  queue.Push(Delta(0, "b", 2));
  finished.set_index(0);
  queue.Push(finished);
  EXPECT_EQ(std::get<pb::Delta>(*queue.Pop()).text(), "ab");
  EXPECT_EQ(std::get<pb::Finished>(*queue.Pop()).index(), 1U);
  EXPECT_EQ(std::get<pb::Finished>(*queue.Pop()).index(), 0U);
}

TEST(EventQueue, MessagesStaySmallAndNothingIsLost) {
  EventQueue queue;
  std::string sent;
  for (uint32_t i = 0; i < 5000; ++i) {
    const std::string text(1 + i % 7, static_cast<char>('a' + i % 26));
    sent += text;
    queue.Push(Delta(0, text, i + 1, {i}));
  }
  std::string received;
  uint32_t tokens = 0;
  while (auto event = queue.Pop()) {
    EXPECT_LE(EventQueue::BytesOf(*event), EventQueue::kDeltaBytes);
    const auto& delta = std::get<pb::Delta>(*event);
    received += delta.text();
    tokens += static_cast<uint32_t>(delta.token_ids_size());
    EXPECT_EQ(delta.completion_tokens(), tokens);
  }
  EXPECT_EQ(received, sent);
  EXPECT_EQ(tokens, 5000U);
}

TEST(EventQueue, ClearForgetsItsBytes) {
  EventQueue queue;
  queue.Push(Delta(0, "abc", 1));
  EXPECT_GT(queue.bytes(), 3U);
  queue.Clear();
  EXPECT_EQ(queue.bytes(), 0U);
  EXPECT_TRUE(queue.empty());
}

}  // namespace
}  // namespace nibble::gateway
