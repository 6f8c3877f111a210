#include "worker/step/crc32c.h"

#include <numeric>
#include <random>
#include <string_view>
#include <vector>

#include "gtest/gtest.h"

namespace nibble::step {
namespace {

std::span<const std::byte> Bytes(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

std::vector<std::byte> Filled(size_t count, uint8_t first, int step) {
  std::vector<std::byte> bytes(count);
  for (size_t i = 0; i < count; ++i) {
    bytes[i] = static_cast<std::byte>(first + static_cast<int>(i) * step);
  }
  return bytes;
}

void ExpectBoth(std::span<const std::byte> bytes, uint32_t crc) {
  EXPECT_EQ(Crc32c(bytes), crc);
  EXPECT_EQ(Crc32cPortable(bytes), crc);
}

TEST(Crc32cTest, GivesThePublishedVectors) {
  // RFC 3720, appendix B.4.
  ExpectBoth(Filled(32, 0x00, 0), 0x8A9136AA);
  ExpectBoth(Filled(32, 0xFF, 0), 0x62A8AB43);
  ExpectBoth(Filled(32, 0, 1), 0x46DD794E);
  ExpectBoth(Filled(32, 31, -1), 0x113FDB5C);
  // The catalogue's check value.
  ExpectBoth(Bytes("123456789"), 0xE3069283);
  ExpectBoth({}, 0);
}

TEST(Crc32cTest, InstructionAndTableAgreeOnEveryLengthAndOffset) {
  std::mt19937 random(1);
  std::vector<std::byte> bytes(300);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  for (size_t begin = 0; begin < 9; ++begin) {
    for (size_t count = 0; begin + count <= bytes.size(); ++count) {
      const auto part = std::span(bytes).subspan(begin, count);
      ASSERT_EQ(Crc32c(part), Crc32cPortable(part)) << begin << " " << count;
    }
  }
}

TEST(Crc32cTest, ContinuesWhereItStopped) {
  const auto all = Bytes("plans travel as records");
  EXPECT_EQ(Crc32c(all.subspan(7), Crc32c(all.first(7))), Crc32c(all));
  EXPECT_EQ(Crc32cPortable(all.subspan(7), Crc32cPortable(all.first(7))), Crc32cPortable(all));
}

}  // namespace
}  // namespace nibble::step
