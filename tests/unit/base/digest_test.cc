#include "base/digest.h"

#include <gtest/gtest.h>

#include <string>

namespace nibble {
namespace {

// FIPS 180-2's examples.
constexpr char kAbc[] = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
constexpr char kNothing[] = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

TEST(Digest, PartsMakeNoDifferenceAndEachBeginsAnew) {
  Digest digest;
  EXPECT_EQ(digest.FinishHex(), kNothing);
  digest.Add("abc");
  EXPECT_EQ(digest.FinishHex(), kAbc);
  digest.Add("a");
  digest.Add(std::string_view());
  digest.Add("bc", 2);
  EXPECT_EQ(digest.FinishHex(), kAbc);
  EXPECT_EQ(digest.FinishHex(), kNothing);
}

TEST(Digest, TheShorterHashLeavesTheRestZero) {
  Digest digest(HashKind::kSha1);
  digest.Add("abc");
  EXPECT_EQ(digest.FinishHex(), "a9993e364706816aba3e25717850c26c9cd0d89d");
  digest.Add("abc");
  const Digest::Hash hash = digest.Finish();
  EXPECT_EQ(hash[0], 0xa9);
  EXPECT_EQ(hash[19], 0x9d);
  for (size_t i = 20; i < hash.size(); ++i) EXPECT_EQ(hash[i], 0);
}

}  // namespace
}  // namespace nibble
