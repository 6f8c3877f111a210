#include "services/fetch/listing.h"

#include <gtest/gtest.h>

namespace nibble::fetch {
namespace {

constexpr char kRevision[] = "0123456789abcdef0123456789abcdef01234567";
constexpr char kSha256[] = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

Source Hub() { return *ParseSource("hf://org/model@v1.0"); }

std::string Answer(const std::string& siblings) {
  return std::string(R"({"sha": ")") + kRevision + R"(", "siblings": [)" + siblings + "]}";
}

std::string Small(const std::string& name) {
  return R"({"rfilename": ")" + name + R"(", "size": 7, "blobId": ")" + kRevision + R"("})";
}

TEST(SourceTest, HubAndFolderAreTold) {
  EXPECT_EQ(Hub().repo, "org/model");
  EXPECT_EQ(Hub().revision, "v1.0");
  EXPECT_EQ(ParseSource("hf://01-ai/Yi-6B_x")->revision, "main");
  EXPECT_EQ(ParseSource("hf://a/b@refs/pr/1")->revision, "refs/pr/1");
  EXPECT_EQ(ParseSource("https://h/models/m")->folder.target, "/models/m/");
  EXPECT_EQ(ListingUrl(*ParseSource("https://h/m/"), {}).Shown(), "https://h/m/SHA256SUMS");
}

TEST(SourceTest, WhatIsNoneIsRefused) {
  for (const char* text :
       {"", "model", "hf://", "hf://a", "hf://a/", "hf:///b", "hf://a/b/c", "hf://a/..",
        "hf://../b", "hf://a/b@", "hf://a/b@x//y", "hf://a/b@../x", "hf://a/b c", "hf://a/b@-x",
        "oci://r/m:1", "file:///m", "https://h/m?x", "https://u@h/m"}) {
    EXPECT_TRUE(absl::IsInvalidArgument(ParseSource(text).status())) << text;
  }
}

TEST(HubListingTest, FilesHaveAddressSizeAndSum) {
  const Url hub = *ParseUrl("https://hub.example/");
  EXPECT_EQ(ListingUrl(*ParseSource("hf://org/model@pr/1"), hub).target,
            "/api/models/org/model/revision/pr%2F1?blobs=true");
  const auto listing = ReadHubListing(
      Answer(Small("config.json") + R"(, {"rfilename": "model.safetensors", "size": 135,
             "blobId": "x", "lfs": {"size": 1234567890123, "sha256": ")" +
             kSha256 + R"("}}, )" + Small("sub/config.json") + "," + Small("model.bin")),
      Hub(), hub);
  ASSERT_TRUE(listing.ok()) << listing.status();
  EXPECT_EQ(listing->revision, kRevision);
  ASSERT_EQ(listing->files.size(), 2U);
  const RemoteFile& large = listing->files[1];
  EXPECT_EQ(large.size, 1234567890123);
  EXPECT_EQ(large.hex, kSha256);
  EXPECT_EQ(large.digest, DigestKind::kSha256);
  EXPECT_EQ(large.url.Shown(), std::string("https://hub.example/org/model/resolve/") + kRevision +
                                   "/model.safetensors");
  EXPECT_EQ(listing->files[0].digest, DigestKind::kGitBlob);
  EXPECT_EQ(listing->files[0].size, 7);
}

TEST(HubListingTest, WhatIsNoneIsDataLoss) {
  for (const std::string& text :
       {std::string(), std::string("[]"), std::string("{"), Answer(""), Answer("1"), Answer("{}"),
        Answer(Small("tokenizer.json")), Answer(Small("config.json") + "," + Small("config.json")),
        Answer(R"({"rfilename": "config.json"})"),
        Answer(R"({"rfilename": "config.json", "size": -1, "blobId": ")" + std::string(kRevision) +
               R"("})"),
        Answer(R"({"rfilename": "config.json", "size": 1e9, "blobId": ")" + std::string(kRevision) +
               R"("})"),
        Answer(R"({"rfilename": "config.json", "size": 1, "blobId": "0123"})"),
        Answer(R"({"rfilename": "config.json", "lfs": {"size": 1}})"), std::string(100000, '[')}) {
    EXPECT_TRUE(absl::IsDataLoss(ReadHubListing(text, Hub(), Url{}).status()))
        << text.substr(0, 200);
  }
}

TEST(SumsListingTest, LinesAreRead) {
  const Source source = *ParseSource("https://h/m");
  const std::string sum = kSha256;
  const auto listing = ReadSumsListing(
      sum + "  config.json\r\n" + sum + " *a b+c.json\n\n" + sum + "  ./x.txt\n", source);
  ASSERT_TRUE(listing.ok()) << listing.status();
  ASSERT_EQ(listing->files.size(), 3U);
  EXPECT_EQ(listing->files[1].name, "a b+c.json");
  EXPECT_EQ(listing->files[1].url.target, "/m/a%20b%2Bc.json");
  EXPECT_EQ(listing->files[2].name, "x.txt");
  EXPECT_EQ(listing->files[2].size, -1);
}

}  // namespace
}  // namespace nibble::fetch
