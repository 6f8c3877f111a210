// GET over HTTP(S): proxies and authorities by the environment, redirects without handing a token
// on, and what went wrong in words that may be logged.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "base/clock.h"
#include "services/fetch/proxy.h"
#include "services/fetch/url.h"

namespace nibble::fetch {

struct GetRequest {
  Url url;
  std::string bearer;  // shown to the address's own origin alone; empty = none
  int64_t from = 0;    // bytes that are there already
};

// What a body begins with.
struct BodyHead {
  int64_t from = 0;    // 0 where the server does not continue
  int64_t total = -1;  // of the whole file; -1: it does not say
};

// How a GET ended.
struct GetOutcome {
  absl::Status status;                // names the address without its query, never a token
  bool again = false;                 // the next try may have more luck
  Duration after = Duration::zero();  // what the server asks to wait for
};

// One thread. Authorities are OpenSSL's: SSL_CERT_FILE and SSL_CERT_DIR, else the system's.
class HttpClient {
 public:
  struct Options {
    GetEnv env;
    Duration connect_timeout = std::chrono::seconds(20);
    Duration stall_timeout = std::chrono::seconds(60);  // without a byte
  };

  explicit HttpClient(Options options) : options_(std::move(options)) {}

  // Hands the body on piece by piece after `begin`. An error of either ends the request and is
  // the outcome, as it is.
  [[nodiscard]] GetOutcome Get(const GetRequest& request,
                               const std::function<absl::Status(const BodyHead&)>& begin,
                               const std::function<absl::Status(absl::string_view)>& take);

 private:
  Options options_;
};

}  // namespace nibble::fetch
