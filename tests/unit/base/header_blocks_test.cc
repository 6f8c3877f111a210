#include "base/header_blocks.h"

#include <gtest/gtest.h>

#include <string>
#include <string_view>

#include "tests/support/raw_client.h"

namespace nibble {
namespace {

constexpr size_t kBytesMax = 100;
constexpr uint8_t kData = 0;
constexpr uint8_t kHeaders = 1;
constexpr uint8_t kContinuation = 9;
constexpr uint8_t kEndHeaders = 4;
constexpr std::string_view kPreface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

// What its payload reads as would be a frame of headers.
std::string Frame(uint8_t type, uint8_t flags, size_t bytes) {
  return testing::Http2Frame(type, flags, 1, std::string(bytes, '\x01'));
}

bool Take(HeaderBlocks* blocks, std::string_view bytes) {
  return blocks->Take({reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()});
}

bool Take(const std::string& frames, size_t piece = SIZE_MAX) {
  HeaderBlocks blocks(kBytesMax);
  const std::string all = std::string(kPreface) + frames;
  for (size_t at = 0; at < all.size(); at += std::min(piece, all.size() - at)) {
    if (!Take(&blocks, std::string_view(all).substr(at, piece))) return false;
  }
  return true;
}

TEST(HeaderBlocks, OneThatFitsPasses) {
  EXPECT_TRUE(Take(Frame(kHeaders, kEndHeaders, kBytesMax)));
  EXPECT_TRUE(Take(Frame(kHeaders, 0, kBytesMax - 1) + Frame(kContinuation, kEndHeaders, 1)));
}

TEST(HeaderBlocks, OneByteMoreDoesNot) {
  EXPECT_FALSE(Take(Frame(kHeaders, kEndHeaders, kBytesMax + 1)));
  EXPECT_FALSE(Take(Frame(kHeaders, 0, kBytesMax) + Frame(kContinuation, kEndHeaders, 1)));
}

TEST(HeaderBlocks, EachCallHasItsOwn) {
  std::string frames;
  for (int i = 0; i < 1000; ++i) {
    frames += Frame(kHeaders, kEndHeaders, kBytesMax) + Frame(kData, 1, 70'000);
  }
  EXPECT_TRUE(Take(frames));
}

TEST(HeaderBlocks, FramesWithoutBytesEndToo) {
  std::string frames = Frame(kHeaders, 0, 1);
  for (int i = 1; i < HeaderBlocks::kFramesMax; ++i) frames += Frame(kContinuation, 0, 0);
  EXPECT_TRUE(Take(frames));
  EXPECT_FALSE(Take(frames + Frame(kContinuation, kEndHeaders, 0)));
}

TEST(HeaderBlocks, PiecesMakeNoDifference) {
  const std::string good = Frame(kData, 0, 300) + Frame(kHeaders, 0, kBytesMax / 2) +
                           Frame(kContinuation, kEndHeaders, kBytesMax / 2) +
                           Frame(kHeaders, kEndHeaders, kBytesMax);
  const std::string bad = good + Frame(kHeaders, 0, kBytesMax) + Frame(kContinuation, 0, 1);
  for (size_t piece = 1; piece < 40; ++piece) {
    EXPECT_TRUE(Take(good, piece)) << piece;
    EXPECT_FALSE(Take(bad, piece)) << piece;
  }
}

// The announcement is enough.
TEST(HeaderBlocks, NothingIsWaitedFor) {
  EXPECT_FALSE(Take(Frame(kHeaders, 0, 1 << 20).substr(0, 9)));
}

}  // namespace
}  // namespace nibble
