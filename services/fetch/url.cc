#include "services/fetch/url.h"

#include <arpa/inet.h>

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "base/host_port.h"
#include "base/status.h"

namespace nibble::fetch {
namespace {

constexpr uint16_t kHttpPort = 80;
constexpr uint16_t kHttpsPort = 443;
constexpr size_t kUrlBytesMax = 8192;

uint16_t DefaultPort(bool https) { return https ? kHttpsPort : kHttpPort; }

absl::Status ParseAuthority(absl::string_view authority, Url* url) {
  if (authority.find('@') != absl::string_view::npos) {
    return absl::InvalidArgumentError("an address may hold no user and no password");
  }
  absl::string_view host = authority;
  absl::string_view port;
  if (absl::StartsWith(host, "[")) {
    const size_t end = host.find(']');
    if (end == absl::string_view::npos)
      return absl::InvalidArgumentError("a bracket is not closed");
    port = host.substr(end + 1);
    host = host.substr(1, end - 1);
    if (!port.empty() && !absl::ConsumePrefix(&port, ":")) {
      return absl::InvalidArgumentError("behind a bracket only a port may stand");
    }
  } else if (const size_t colon = host.find(':'); colon != absl::string_view::npos) {
    port = host.substr(colon + 1);
    host = host.substr(0, colon);
  }
  const bool plain = std::all_of(host.begin(), host.end(), [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '.' || c == ':' ||
           c == '_';
  });
  if (host.empty() || !plain)
    return absl::InvalidArgumentError("the host is no name and no address");
  uint32_t number = url->port;
  if (!port.empty() && (!absl::SimpleAtoi(port, &number) || number == 0 || number > UINT16_MAX)) {
    return absl::InvalidArgumentError("the port is no number from 1 to 65535");
  }
  url->host = absl::AsciiStrToLower(host);
  url->port = static_cast<uint16_t>(number);
  return absl::OkStatus();
}

// "/a/b/../c" and "/a/./c" as they are meant; the query stays.
std::string WithoutDots(absl::string_view target) {
  const size_t query = std::min(target.find('?'), target.size());
  std::string out;
  absl::string_view path = target.substr(0, query);
  while (absl::ConsumePrefix(&path, "/")) {
    const size_t end = std::min(path.find('/'), path.size());
    const absl::string_view segment = path.substr(0, end);
    path.remove_prefix(end);
    const bool last = path.empty();
    if (segment == "..") {
      out.resize(out.empty() ? 0 : out.rfind('/'));
      if (last) out += '/';
    } else if (segment == ".") {
      if (last) out += '/';
    } else {
      absl::StrAppend(&out, "/", segment);
    }
  }
  return absl::StrCat(out.empty() ? "/" : out, target.substr(query));
}

}  // namespace

std::string Url::Origin() const {
  const std::string scheme = https ? "https://" : "http://";
  if (port != DefaultPort(https)) return scheme + FormatHostPort(host, port);
  return absl::StrCat(scheme, absl::StrContains(host, ':') ? absl::StrCat("[", host, "]") : host);
}

std::string Url::Shown() const { return Origin() + target.substr(0, target.find('?')); }

bool Url::IsLoopback() const { return IsLoopbackHost(host); }

absl::StatusOr<Url> ParseUrl(absl::string_view text) {
  Url url;
  absl::string_view rest = text.substr(0, text.find('#'));
  if (absl::StartsWithIgnoreCase(rest, "https://")) {
    rest.remove_prefix(8);
  } else if (absl::StartsWithIgnoreCase(rest, "http://")) {
    rest.remove_prefix(7);
    url.https = false;
    url.port = kHttpPort;
  } else {
    return absl::InvalidArgumentError("an address begins with https:// or http://");
  }
  const bool visible = std::all_of(rest.begin(), rest.end(), [](char c) {
    return absl::ascii_isgraph(static_cast<unsigned char>(c));
  });
  if (!visible || text.size() > kUrlBytesMax) {
    return absl::InvalidArgumentError("an address is at most 8192 visible characters");
  }
  const size_t end = std::min(rest.find_first_of("/?"), rest.size());
  RETURN_IF_ERROR(ParseAuthority(rest.substr(0, end), &url));
  const absl::string_view target = rest.substr(end);
  url.target =
      WithoutDots(absl::StartsWith(target, "/") ? std::string(target) : absl::StrCat("/", target));
  return url;
}

absl::StatusOr<Url> ResolveUrl(const Url& base, absl::string_view location) {
  if (absl::StrContains(location.substr(0, location.find('?')), "://")) return ParseUrl(location);
  const std::string scheme = base.https ? "https:" : "http:";
  if (absl::StartsWith(location, "//")) return ParseUrl(absl::StrCat(scheme, location));
  if (absl::StartsWith(location, "/")) return ParseUrl(absl::StrCat(base.Origin(), location));
  const std::string path = base.target.substr(0, base.target.find('?'));
  return ParseUrl(absl::StrCat(base.Origin(), path.substr(0, path.rfind('/') + 1), location));
}

std::string EncodePath(absl::string_view text, bool keep_slash) {
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (absl::ascii_isalnum(byte) || absl::StrContains("-._~", c) || (keep_slash && c == '/')) {
      out += c;
    } else {
      absl::StrAppendFormat(&out, "%%%02X", byte);
    }
  }
  return out;
}

}  // namespace nibble::fetch
