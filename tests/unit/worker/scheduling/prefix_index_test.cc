// Names of blocks, and what the index believes of them.
#include "worker/scheduling/prefix_index.h"

#include <numeric>
#include <set>

#include "absl/strings/escaping.h"
#include "gtest/gtest.h"

namespace nibble::scheduling {
namespace {

std::array<int32_t, step::kBlockTokens> Tokens(int32_t first) {
  std::array<int32_t, step::kBlockTokens> tokens{};
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

std::string Hex(const BlockName& name) {
  return absl::BytesToHexString({reinterpret_cast<const char*>(name.data()), name.size()});
}

// Computed with Python's hashlib from the definition in the header.
TEST(PrefixNamerTest, NamesAreChainedSha256) {
  PrefixNamer namer("key", "model");
  const BlockName root = namer.Root("salt");
  EXPECT_EQ(Hex(root), "8c56fa5e2929a82aed7b55ec86730c9586021af5bd165d4a1baa5d0dd867eb87");
  EXPECT_EQ(Hex(namer.Next(namer.Next(root, Tokens(0)), Tokens(16))),
            "4b4d69ef335dee4c4b45a1377e92528fba3b0ec4a0a221fef93b6471959cda25");
}

TEST(PrefixNamerTest, EverythingThatAPrefixIsMadeOfIsInItsName) {
  std::set<std::string> names;
  for (const char* key : {"", "k"}) {
    for (const char* model : {"", "m"}) {
      PrefixNamer namer(key, model);
      for (const char* salt : {"", "a", "b"}) {
        for (const int32_t first : {0, 1}) {
          const BlockName one = namer.Next(namer.Root(salt), Tokens(first));
          names.insert(Hex(one));
          names.insert(Hex(namer.Next(one, Tokens(first))));
        }
      }
    }
  }
  EXPECT_EQ(names.size(), 2u * 2u * 3u * 2u * 2u);
}

class PrefixIndexTest : public ::testing::Test {
 protected:
  // All of these have the same name.
  PrefixBlock Block(PrefixOwner* owner, uint64_t before, int32_t first) {
    tokens_ = Tokens(first);
    return {.name = name_, .before = before, .owner = owner, .tokens = tokens_};
  }

  PrefixIndex index_{8, "key", "model"};
  PrefixOwner* owner_ = index_.Join("a");
  const BlockName name_{};
  std::array<int32_t, step::kBlockTokens> tokens_{};
};

TEST_F(PrefixIndexTest, ANameAloneIsNotBelieved) {
  PrefixOwner* other = index_.Join("b");
  index_.Insert(3, Block(owner_, 7, 100));
  EXPECT_EQ(index_.Find(Block(owner_, 7, 100)), 3);
  EXPECT_EQ(index_.Find(Block(owner_, 7, 101)), -1);
  EXPECT_EQ(index_.Find(Block(owner_, 8, 100)), -1);
  EXPECT_EQ(index_.Find(Block(other, 7, 100)), -1);
  EXPECT_EQ(index_.FindName(name_), 3);
  EXPECT_EQ(index_.CheckInvariants(), absl::OkStatus());
}

TEST_F(PrefixIndexTest, AnEntryThatComesBackIsAnotherOne) {
  index_.Insert(3, Block(owner_, 0, 100));
  const uint64_t serial = index_.Serial(3);
  index_.Erase(3);
  EXPECT_EQ(index_.Serial(3), 0u);
  index_.Insert(3, Block(owner_, 0, 100));
  EXPECT_GT(index_.Serial(3), serial);
}

TEST_F(PrefixIndexTest, AnOwnerStaysAsLongAsItHasAnything) {
  PrefixOwner* again = index_.Join("a");
  EXPECT_EQ(again, owner_);
  index_.Insert(0, Block(owner_, 0, 0));
  index_.Leave(owner_);
  index_.Leave(owner_);
  EXPECT_EQ(index_.owners(), 1u);
  EXPECT_EQ(index_.Join("a"), owner_);
  index_.Leave(owner_);
  index_.Erase(0);
  EXPECT_EQ(index_.owners(), 0u);
}

TEST_F(PrefixIndexTest, WhatHasRestedLongestGoesFirst) {
  for (const int32_t block : {0, 1, 2}) {
    const BlockName name = index_.NameAfter(owner_->root, Tokens(block));
    const auto tokens = Tokens(block);
    index_.Insert(block, {.name = name, .before = 0, .owner = owner_, .tokens = tokens});
  }
  for (const int32_t block : {2, 0, 1}) index_.Rest(block);
  EXPECT_EQ(index_.LongestResting(), 2);
  index_.Wake(2);
  EXPECT_EQ(index_.LongestResting(), 0);
  index_.Rest(2);
  index_.Wake(0);
  EXPECT_EQ(index_.LongestResting(), 1);
  EXPECT_EQ(index_.resting(), 2);
  EXPECT_EQ(owner_->resting.size, 2);
  EXPECT_EQ(index_.CheckInvariants(), absl::OkStatus());
}

}  // namespace
}  // namespace nibble::scheduling
