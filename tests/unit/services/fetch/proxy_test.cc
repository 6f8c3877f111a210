#include "services/fetch/proxy.h"

#include <gtest/gtest.h>

#include <map>

namespace nibble::fetch {
namespace {

using Variables = std::map<std::string, std::string>;

absl::StatusOr<std::optional<Proxy>> Find(const char* url, const Variables& variables) {
  return ProxyFor(*ParseUrl(url), [&variables](const char* name) {
    const auto found = variables.find(name);
    return found == variables.end() ? nullptr : found->second.c_str();
  });
}

// "host:port", or "direct".
std::string Through(const char* url, const Variables& variables) {
  const absl::StatusOr<std::optional<Proxy>> proxy = Find(url, variables);
  if (!proxy.ok()) return std::string(proxy.status().message());
  return proxy->has_value() ? (*proxy)->host + ":" + std::to_string((*proxy)->port) : "direct";
}

TEST(ProxyTest, EachSchemeHasItsVariables) {
  const Variables both = {{"https_proxy", "http://a:1"}, {"http_proxy", "b:2"}};
  EXPECT_EQ(Through("https://h/", both), "a:1");
  EXPECT_EQ(Through("http://h/", both), "b:2");
  EXPECT_EQ(Through("https://h/", {{"HTTPS_PROXY", "http://a:1"}}), "a:1");
  EXPECT_EQ(Through("https://h/", {{"ALL_PROXY", "http://a:1"}}), "a:1");
  EXPECT_EQ(Through("http://h/", {{"all_proxy", "http://a:1"}}), "a:1");
  EXPECT_EQ(Through("https://h/", {{"https_proxy", ""}, {"HTTPS_PROXY", "http://a:1"}}), "a:1");
  EXPECT_EQ(Through("https://h/", {}), "direct");
  // A web server's environment has what its client says under this name.
  EXPECT_EQ(Through("http://h/", {{"HTTP_PROXY", "http://a:1"}}), "direct");
}

TEST(ProxyTest, HostsAreExempt) {
  for (const auto& [list, exempt] :
       std::initializer_list<std::pair<const char*, bool>>{{"*", true},
                                                           {"hub.example", true},
                                                           {"x, Example", true},
                                                           {".example", true},
                                                           {"hub.example:443", true},
                                                           {"hub.example:80", false},
                                                           {"ub.example", false},
                                                           {"example.hub", false},
                                                           {"", false}}) {
    EXPECT_EQ(Through("https://hub.example/", {{"https_proxy", "a:1"}, {"no_proxy", list}}),
              exempt ? "direct" : "a:1")
        << list;
  }
  EXPECT_EQ(Through("https://[::1]/", {{"https_proxy", "a:1"}, {"NO_PROXY", "[::1]"}}), "direct");
}

TEST(ProxyTest, UsersAndPasswordsAreTakenAndNeverRepeated) {
  const auto proxy = Find("https://h/", {{"https_proxy", "http://us%40er:p%3aw@a:1/"}});
  ASSERT_TRUE(proxy.ok() && proxy->has_value());
  EXPECT_EQ((*proxy)->user, "us@er");
  EXPECT_EQ((*proxy)->password, "p:w");
  for (const char* value :
       {"socks5://u:qzxv@a:1", "https://u:qzxv@a:1", "http://u:qzxv@", "a:qzxv"}) {
    const auto refused = Find("https://h/", {{"https_proxy", value}});
    EXPECT_TRUE(absl::IsInvalidArgument(refused.status())) << value;
    const std::string said(refused.status().message());
    EXPECT_EQ(said.find("qzxv"), std::string::npos) << said;
    EXPECT_NE(said.find("https_proxy"), std::string::npos) << said;
  }
}

}  // namespace
}  // namespace nibble::fetch
