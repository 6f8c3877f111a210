#include "base/units.h"

#include <gtest/gtest.h>

namespace nibble {
namespace {

TEST(Units, ReadsSizes) {
  EXPECT_EQ(ParseBytes("4096"), 4096);
  EXPECT_EQ(ParseBytes("0"), 0);
  EXPECT_EQ(ParseBytes("24GiB"), int64_t{24} << 30);
  EXPECT_EQ(ParseBytes("1.5MiB"), 3 << 19);
  EXPECT_EQ(ParseBytes("2GB"), 2'000'000'000);
}

TEST(Units, RefusesWhatIsNoSize) {
  for (const char* text :
       {"", "-1", "GiB", "1gib", "1 GiB", "1GiBs", "nan", "inf", "1e3", "99999999TiB"}) {
    EXPECT_EQ(ParseBytes(text), std::nullopt) << text;
  }
}

TEST(Units, WritesSizes) {
  EXPECT_EQ(FormatBytes(0), "0B");
  EXPECT_EQ(FormatBytes(1023), "1023B");
  EXPECT_EQ(FormatBytes(int64_t{24} << 30), "24GiB");
  EXPECT_EQ(FormatBytes(3 << 19), "1.50MiB");
}

TEST(Units, ReadsTimes) {
  EXPECT_EQ(ParseDuration("0"), Duration::zero());
  EXPECT_EQ(ParseDuration("500ms"), std::chrono::milliseconds(500));
  EXPECT_EQ(ParseDuration("1.5s"), std::chrono::milliseconds(1500));
  EXPECT_EQ(ParseDuration("2m"), std::chrono::minutes(2));
  for (const char* text : {"", "5", "-1s", "s", "1 s", "1d", "999999999h"}) {
    EXPECT_EQ(ParseDuration(text), std::nullopt) << text;
  }
}

TEST(Units, WritesTimes) {
  EXPECT_EQ(FormatDuration(Duration::zero()), "0");
  EXPECT_EQ(FormatDuration(std::chrono::seconds(90)), "90s");
  EXPECT_EQ(FormatDuration(std::chrono::minutes(2)), "2m");
  EXPECT_EQ(FormatDuration(std::chrono::milliseconds(500)), "500ms");
}

}  // namespace
}  // namespace nibble
