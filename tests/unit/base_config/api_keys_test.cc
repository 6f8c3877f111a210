#include "base/api_keys.h"

#include <filesystem>
#include <fstream>
#include <set>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace nibble {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using ::testing::Not;

// The sum of "abc", FIPS 180-2 appendix B.1.
constexpr char kAbc[] = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

class ApiKeysTest : public ::testing::Test {
 protected:
  ~ApiKeysTest() override { std::filesystem::remove(path_); }

  absl::StatusOr<ApiKeyFile> Read(const std::string& text) {
    std::ofstream(path_) << text;
    return ReadApiKeys(path_);
  }
  std::string Refusal(const std::string& text) {
    const auto file = Read(text);
    return file.ok() ? "taken" : std::string(file.status().message());
  }

  const std::string path_ = ::testing::TempDir() + "/keys-" + std::to_string(getpid()) + ".toml";
};

std::string Entry(const std::string& more) {
  return std::string("[keys]\na = { sha256 = \"") + kAbc + "\", " + more + " }\n";
}

TEST_F(ApiKeysTest, HashesAreThePublishedOnes) {
  EXPECT_EQ(HexOf(HashOf("abc")), kAbc);
  EXPECT_TRUE(Equal(HashOf("abc"), HashOf("abc")));
  EXPECT_FALSE(Equal(HashOf("abc"), HashOf("abd")));
}

TEST_F(ApiKeysTest, AFileSaysWhoMayDoWhat) {
  const auto file = Read(Entry("tenant = \"t\", priority = \"high\", max_requests = 3, "
                               "models = [\"m\", \"n\"], admin = true") +
                         "[tenants]\nt = { tokens_per_minute = 600, max_requests = 9 }\n");
  ASSERT_TRUE(file.ok()) << file.status();
  ASSERT_EQ(file->keys.size(), 1u);
  const ApiKey& key = file->keys[0];
  EXPECT_EQ(key.id, "a");
  EXPECT_TRUE(Equal(key.hash, HashOf("abc")));
  EXPECT_EQ(key.tenant, "t");
  EXPECT_EQ(key.priority, Priority::kHigh);
  EXPECT_EQ(key.max_requests, 3);
  EXPECT_THAT(key.models, ElementsAre("m", "n"));
  EXPECT_TRUE(key.admin);
  ASSERT_EQ(file->tenants.size(), 1u);
  EXPECT_EQ(file->tenants[0].tokens_per_minute, 600);
  EXPECT_EQ(file->tenants[0].max_requests, 9);
}

TEST_F(ApiKeysTest, WhatIsLeftOutIsTheLeastSurprising) {
  const auto file = Read(Entry("tenant = \"t\""));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->keys[0].priority, Priority::kNormal);
  EXPECT_FALSE(file->keys[0].admin);
  ASSERT_EQ(file->tenants.size(), 1u);  // though it has no line of its own
  EXPECT_EQ(file->tenants[0].tokens_per_minute, 0);
}

TEST_F(ApiKeysTest, WhatIsWrongIsNamedWithoutAHash) {
  EXPECT_THAT(Refusal(""), HasSubstr("has no key"));
  EXPECT_THAT(Refusal("keys = 1"), HasSubstr("keys"));
  EXPECT_THAT(Refusal("[other.a]\nx = 1"), HasSubstr("in [keys] or [tenants]"));
  EXPECT_THAT(Refusal(Entry("tenants = \"t\"")), HasSubstr("keys.a.tenants is not sha256, tenant"));
  EXPECT_THAT(Refusal(Entry("tenant = \"two words\"")), HasSubstr("keys.a.tenant is not a name"));
  EXPECT_THAT(Refusal(Entry("priority = \"urgent\"")), HasSubstr("low, normal or high"));
  EXPECT_THAT(Refusal(Entry("max_requests = 0")), HasSubstr("keys.a.max_requests"));
  EXPECT_THAT(Refusal(Entry("admin = \"yes\"")), HasSubstr("true or false"));
  EXPECT_THAT(Refusal(Entry("models = []")), HasSubstr("keys.a.models"));
  EXPECT_THAT(Refusal(Entry("max_requests = 1")), HasSubstr("keys.a.tenant is not set"));
  EXPECT_THAT(Refusal("[keys]\na = { tenant = \"t\" }"), HasSubstr("keys.a.sha256 is not set"));
  const std::string secret = "nbl_plain-key-in-the-wrong-place";
  EXPECT_THAT(Refusal("[keys]\na = { sha256 = \"" + secret + "\", tenant = \"t\" }"),
              AllOf(HasSubstr("64 hexadecimal digits"), Not(HasSubstr(secret))));
  EXPECT_THAT(
      Refusal(Entry("tenant = \"t\"") + "b = { tenant = \"t\", sha256 = \"" + kAbc + "\" }"),
      AllOf(HasSubstr("keys.b is the same key as keys.a"), Not(HasSubstr(kAbc))));
}

TEST_F(ApiKeysTest, NewKeysAreLongAndDifferent) {
  std::set<std::string> seen;
  for (int i = 0; i < 100; ++i) {
    const std::string key = NewApiKey();
    EXPECT_THAT(key, MatchesRegex("nbl_[A-Za-z0-9_-]{43}"));
    EXPECT_TRUE(seen.insert(key).second);
  }
}

TEST_F(ApiKeysTest, ALineThatIsPrintedIsReadBack) {
  ApiKey key;
  key.id = "a-1";
  key.hash = HashOf(NewApiKey());
  key.tenant = "t";
  key.priority = Priority::kLow;
  key.max_requests = 2;
  key.models = {"a \"model\"", "b"};
  key.admin = true;
  const auto file = Read("[keys]\n" + FormatApiKey(key) + "\n");
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_TRUE(Equal(file->keys[0].hash, key.hash));
  EXPECT_EQ(file->keys[0].models, key.models);
  EXPECT_EQ(FormatApiKey(file->keys[0]), FormatApiKey(key));
}

}  // namespace
}  // namespace nibble
