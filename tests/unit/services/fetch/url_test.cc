#include "services/fetch/url.h"

#include <gtest/gtest.h>

namespace nibble::fetch {
namespace {

Url Parsed(absl::string_view text) {
  const absl::StatusOr<Url> url = ParseUrl(text);
  EXPECT_TRUE(url.ok()) << text << ": " << url.status();
  return url.value_or(Url{});
}

TEST(UrlTest, PartsAreTaken) {
  const Url url = Parsed("HTTPS://Hub.Example:8443/a%20b/c?x=1&y=/#part");
  EXPECT_TRUE(url.https);
  EXPECT_EQ(url.host, "hub.example");
  EXPECT_EQ(url.port, 8443);
  EXPECT_EQ(url.target, "/a%20b/c?x=1&y=/");
  EXPECT_EQ(url.Origin(), "https://hub.example:8443");
  EXPECT_EQ(Parsed("http://h").target, "/");
  EXPECT_EQ(Parsed("http://h?q").target, "/?q");
  EXPECT_EQ(Parsed("http://h").port, 80);
  EXPECT_EQ(Parsed("https://[::1]:9/x").host, "::1");
  EXPECT_EQ(Parsed("https://[::1]/x").Origin(), "https://[::1]");
}

TEST(UrlTest, WhatIsShownHasNoQuery) {
  EXPECT_EQ(Parsed("https://h/a?signature=s").Shown(), "https://h/a");
}

TEST(UrlTest, WhatIsNoAddressIsRefusedWithoutBeingRepeated) {
  for (const char* text :
       {"", "h/x", "ftp://h/x", "https://", "https:///x", "https://user:qzxv@h/", "https://h:0/",
        "https://h:65536/", "https://h:x/", "https://h/a b", "https://h/\n", "https://[::1/",
        "https://[::1]x/", "https://h\"/", "file:///etc/passwd"}) {
    const absl::StatusOr<Url> url = ParseUrl(text);
    EXPECT_TRUE(absl::IsInvalidArgument(url.status())) << text;
    EXPECT_EQ(std::string(url.status().message()).find("qzxv"), std::string::npos);
  }
}

TEST(UrlTest, LocationsLeadFromWhereTheyStand) {
  const Url base = Parsed("https://h:1/a/b?q");
  for (const auto& [location, wanted] : std::initializer_list<std::pair<const char*, const char*>>{
           {"https://o/x", "https://o/x"},
           {"//o/x", "https://o/x"},
           {"/x?u=http://y", "https://h:1/x"},
           {"x", "https://h:1/a/x"},
           {"../x", "https://h:1/x"},
           {"../../../x", "https://h:1/x"},
           {"./x/.", "https://h:1/a/x/"},
           {"x?u=http://y", "https://h:1/a/x"}}) {
    const absl::StatusOr<Url> url = ResolveUrl(base, location);
    ASSERT_TRUE(url.ok()) << location << url.status();
    EXPECT_EQ(url->Shown(), wanted) << location;
  }
}

TEST(UrlTest, OriginsDifferInSchemeHostOrPort) {
  const Url base = Parsed("https://h/a");
  EXPECT_TRUE(base.SameOrigin(Parsed("https://H:443/b")));
  for (const char* other : {"http://h:443/a", "https://h.example/a", "https://h:444/a"}) {
    EXPECT_FALSE(base.SameOrigin(Parsed(other))) << other;
  }
}

TEST(UrlTest, LoopbackIsAnAddressAndNoNameThatBeginsLikeOne) {
  for (const char* here :
       {"http://127.0.0.1:8", "http://127.3.2.1", "http://[::1]", "http://localhost"}) {
    EXPECT_TRUE(Parsed(here).IsLoopback()) << here;
  }
  for (const char* there : {"http://127.example", "http://127.0.0.1.example", "http://1.127.0.0"}) {
    EXPECT_FALSE(Parsed(there).IsLoopback()) << there;
  }
}

TEST(UrlTest, NamesAreEncoded) {
  EXPECT_EQ(EncodePath("a b/c+d%.json", false), "a%20b%2Fc%2Bd%25.json");
  EXPECT_EQ(EncodePath("a/b", true), "a/b");
}

}  // namespace
}  // namespace nibble::fetch
