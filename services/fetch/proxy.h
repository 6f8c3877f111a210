// Which proxy an address is reached through: the environment's variables, read as curl reads them.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "services/fetch/url.h"

namespace nibble::fetch {

using GetEnv = std::function<const char*(const char* name)>;

struct Proxy {
  std::string host;
  uint16_t port = 0;
  std::string user;  // empty = none is shown
  std::string password;
};

// https_proxy (or HTTPS_PROXY) for https, http_proxy for http (in lower case alone: a web server
// would set the other one to what its client says), else all_proxy; none where no_proxy names the
// host, a domain that it is in, or "*". nullopt: directly. INVALID_ARGUMENT: a variable is no http
// proxy; what it holds is not repeated.
[[nodiscard]] absl::StatusOr<std::optional<Proxy>> ProxyFor(const Url& url, const GetEnv& env);

}  // namespace nibble::fetch
