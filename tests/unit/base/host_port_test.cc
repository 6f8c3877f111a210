#include "base/host_port.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace nibble {
namespace {

TEST(HostPort, ReadsNamesAndBothAddressFamilies) {
  const auto name = ParseHostPort("localhost:9100");
  ASSERT_TRUE(name.ok());
  EXPECT_EQ(name->host, "localhost");
  EXPECT_EQ(name->port, 9100);
  const auto six = ParseHostPort("[::1]:0");
  ASSERT_TRUE(six.ok());
  EXPECT_EQ(six->host, "::1");
  EXPECT_EQ(six->port, 0);
  EXPECT_EQ(FormatHostPort(six->host, 50052), "[::1]:50052");
}

TEST(HostPort, RefusesWhatIsNoAddressAndSaysSo) {
  for (const char* text : {"", "9100", ":9100", "host:", "host:-1", "host:65536", "host:9x",
                           "::1:9100", "host:+5", "host:000001"}) {
    const auto parsed = ParseHostPort(text);
    ASSERT_FALSE(parsed.ok()) << text;
    EXPECT_THAT(std::string(parsed.status().message()), testing::HasSubstr("allowed: host:port"));
  }
}

TEST(HostPort, LoopbackIsAnAddressAndNoNameThatBeginsLikeOne) {
  for (const char* here : {"127.0.0.1", "127.1.2.3", "::1", "localhost"}) {
    EXPECT_TRUE(IsLoopbackHost(here)) << here;
  }
  for (const char* there : {"127.evil.example", "128.0.0.1", "::2", "localhost.example", ""}) {
    EXPECT_FALSE(IsLoopbackHost(there)) << there;
  }
}

}  // namespace
}  // namespace nibble
