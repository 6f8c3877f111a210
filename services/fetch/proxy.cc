#include "services/fetch/proxy.h"

#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace nibble::fetch {
namespace {

// The first of the variables that is set and not empty, with its name.
std::pair<std::string, std::string> First(const GetEnv& env,
                                          const std::vector<const char*>& names) {
  for (const char* name : names) {
    const char* value = env(name);
    if (value != nullptr && *value != '\0') return {name, value};
  }
  return {};
}

bool IsExempt(const Url& url, absl::string_view list) {
  for (absl::string_view entry : absl::StrSplit(list, absl::ByAnyChar(", "), absl::SkipEmpty())) {
    if (entry == "*") return true;
    absl::ConsumePrefix(&entry, ".");
    const std::string with_port = absl::StrCat(":", url.port);
    absl::ConsumeSuffix(&entry, with_port);
    absl::ConsumePrefix(&entry, "[");
    absl::ConsumeSuffix(&entry, "]");
    if (absl::EqualsIgnoreCase(url.host, entry)) return true;
    if (absl::EndsWithIgnoreCase(url.host, absl::StrCat(".", entry))) return true;
  }
  return false;
}

// "%40" and the like, in a proxy's user and password.
std::string Decoded(absl::string_view text) {
  const auto digit = [](char c) {
    if (c >= '0' && c <= '9') return c - '0';
    const int letter = (c | 0x20) - 'a';
    return letter >= 0 && letter < 6 ? letter + 10 : -1;
  };
  std::string out;
  for (size_t at = 0; at < text.size(); ++at) {
    if (text[at] == '%' && at + 2 < text.size() && digit(text[at + 1]) >= 0 &&
        digit(text[at + 2]) >= 0) {
      out += static_cast<char>(digit(text[at + 1]) * 16 + digit(text[at + 2]));
      at += 2;
    } else {
      out += text[at];
    }
  }
  return out;
}

}  // namespace

absl::StatusOr<std::optional<Proxy>> ProxyFor(const Url& url, const GetEnv& env) {
  if (IsExempt(url, First(env, {"no_proxy", "NO_PROXY"}).second)) return std::nullopt;
  const auto [name, value] =
      url.https ? First(env, {"https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"})
                : First(env, {"http_proxy", "all_proxy", "ALL_PROXY"});
  if (value.empty()) return std::nullopt;
  absl::string_view rest = value;
  Proxy proxy;
  if (absl::StrContains(rest, "://") && !absl::StartsWithIgnoreCase(rest, "http://")) {
    return absl::InvalidArgumentError(absl::StrCat(
        name, " names a proxy of another kind; allowed: http://[user:password@]host:port"));
  }
  if (const size_t scheme = rest.find("://"); scheme != absl::string_view::npos) {
    rest.remove_prefix(scheme + 3);
  }
  if (const size_t at = rest.rfind('@'); at != absl::string_view::npos) {
    const std::pair<absl::string_view, absl::string_view> who =
        absl::StrSplit(rest.substr(0, at), absl::MaxSplits(':', 1));
    proxy.user = Decoded(who.first);
    proxy.password = Decoded(who.second);
    rest.remove_prefix(at + 1);
  }
  const absl::StatusOr<Url> where = ParseUrl(absl::StrCat("http://", rest));
  if (!where.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, " is no proxy; allowed: http://[user:password@]host:port"));
  }
  proxy.host = where->host;
  proxy.port = where->port;
  return proxy;
}

}  // namespace nibble::fetch
