#include "services/fetch/digest.h"

#include <gtest/gtest.h>

namespace nibble::fetch {
namespace {

std::string Sum(DigestKind kind, absl::string_view text) {
  const auto digest = NewFileDigest(kind, static_cast<int64_t>(text.size()));
  digest->Add(text.data(), text.size() / 2);
  digest->Add(text.data() + text.size() / 2, text.size() - text.size() / 2);
  return digest->FinishHex();
}

// FIPS 180-2, and what `git hash-object` says.
TEST(Digest, IsWhatOthersCompute) {
  EXPECT_EQ(Sum(DigestKind::kSha256, "abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(Sum(DigestKind::kGitBlob, ""), "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391");
  EXPECT_EQ(Sum(DigestKind::kGitBlob, "hello\n"), "ce013625030ba8dba906f756967f9e9ca394464a");
}

TEST(Digest, TextsThatAreNoneAreTold) {
  EXPECT_TRUE(IsDigest(DigestKind::kGitBlob, "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"));
  EXPECT_FALSE(IsDigest(DigestKind::kSha256, "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"));
  EXPECT_FALSE(IsDigest(DigestKind::kGitBlob, "E69de29bb2d1d6434b8b29ae775ad8c2e48c5391"));
}

}  // namespace
}  // namespace nibble::fetch
