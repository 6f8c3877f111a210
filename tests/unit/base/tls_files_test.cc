#include <filesystem>
#include <string>

#include "base/tls_files.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/test_ca.h"

namespace nibble {
namespace {

using ::nibble::testing::ReplaceFile;
using ::nibble::testing::TestCa;
using ::nibble::testing::TestIdentity;
using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr long kHour = 3600;

class TlsFilesTest : public ::testing::Test {
 protected:
  TlsFilesTest() {
    std::string name = ::testing::TempDir() + "/tls-XXXXXX";
    folder_ = mkdtemp(name.data());
    Write(ca_.Issue("server"));
    ReplaceFile(files_.ca, ca_.pem());
  }
  ~TlsFilesTest() override { std::filesystem::remove_all(folder_); }

  void Write(const TestIdentity& identity) {
    files_ = {.certificate = folder_ + "/cert.pem",
              .key = folder_ + "/key.pem",
              .ca = folder_ + "/ca.pem"};
    ReplaceFile(files_.certificate, identity.certificate);
    ReplaceFile(files_.key, identity.key);
  }

  // What a start says of the files; empty where it takes them.
  std::string Refusal() const {
    const auto contents = ReadTlsFiles(files_, {}, std::time(nullptr));
    if (contents.ok()) return "";
    EXPECT_EQ(contents.status().code(), absl::StatusCode::kInvalidArgument);
    const std::string text(contents.status().message());
    EXPECT_EQ(text.find('\n'), std::string::npos) << text;
    return text;
  }

  TestCa ca_;
  std::string folder_;
  TlsFiles files_;
};

TEST_F(TlsFilesTest, AWholeSetIsTaken) {
  EXPECT_EQ(Refusal(), "");
  files_.ca.clear();
  EXPECT_EQ(Refusal(), "");
  files_ = {.certificate = "", .key = "", .ca = folder_ + "/ca.pem"};
  EXPECT_EQ(Refusal(), "");
}

TEST_F(TlsFilesTest, WhatIsMissingIsNamed) {
  for (std::string* path : {&files_.certificate, &files_.key, &files_.ca}) {
    const std::string before = std::exchange(*path, folder_ + "/nowhere.pem");
    EXPECT_THAT(Refusal(), AllOf(HasSubstr("tls."), HasSubstr("nowhere.pem"),
                                 HasSubstr("No such file or directory")));
    *path = before;
  }
}

TEST_F(TlsFilesTest, WhatIsNoFileOrNoPemIsNamed) {
  files_.certificate = folder_;
  EXPECT_THAT(Refusal(), HasSubstr("tls.cert"));
  files_.certificate = folder_ + "/cert.pem";
  ReplaceFile(files_.certificate, "certificate");
  EXPECT_THAT(Refusal(), AllOf(HasSubstr("tls.cert"), HasSubstr("no certificate in PEM")));
  Write(ca_.Issue("server"));
  ReplaceFile(files_.key, "key");
  EXPECT_THAT(Refusal(), AllOf(HasSubstr("tls.key"), HasSubstr("no private key in PEM")));
  Write(ca_.Issue("server"));
  ReplaceFile(files_.ca, "");
  EXPECT_THAT(Refusal(), AllOf(HasSubstr("tls.ca"), HasSubstr("empty")));
  ReplaceFile(files_.ca, std::string(2 << 20, 'x'));
  EXPECT_THAT(Refusal(), HasSubstr("longer than"));
}

TEST_F(TlsFilesTest, AKeyOfAnotherCertificateIsNamed) {
  ReplaceFile(files_.key, ca_.Issue("other").key);
  EXPECT_THAT(Refusal(), AllOf(HasSubstr("tls.key"), HasSubstr("is not the key of tls.cert")));
}

TEST_F(TlsFilesTest, OneWithoutTheOtherIsNamed) {
  files_.key.clear();
  EXPECT_EQ(Refusal(), "tls.key is not set; it goes with tls.cert");
}

TEST_F(TlsFilesTest, DatesCount) {
  Write(ca_.Issue("server", -2 * kHour, -kHour));
  EXPECT_THAT(Refusal(), AllOf(HasSubstr("tls.cert"), HasSubstr("has expired")));
  Write(ca_.Issue("server", kHour, 2 * kHour));
  EXPECT_THAT(Refusal(), AllOf(HasSubstr("tls.cert"), HasSubstr("is not valid yet")));
}

TEST_F(TlsFilesTest, NoMessageHoldsAKey) {
  const TestIdentity identity = ca_.Issue("server");
  const std::string secret = identity.key.substr(40, 24);
  Write(identity);
  ReplaceFile(files_.key, identity.key.substr(0, identity.key.size() / 2));
  EXPECT_THAT(Refusal(), ::testing::Not(HasSubstr(secret)));
}

}  // namespace
}  // namespace nibble
