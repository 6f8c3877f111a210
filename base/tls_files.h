// The PEM files of one side of a TLS connection.
#pragma once

#include <ctime>
#include <string>

#include "absl/status/statusor.h"

namespace nibble {

// Paths of PEM files; empty = none.
struct TlsFiles {
  std::string certificate;  // this side's own, followed by its intermediates
  std::string key;          // of that certificate
  std::string ca;           // who must have signed the other side's

  [[nodiscard]] bool any() const { return !certificate.empty() || !key.empty() || !ca.empty(); }
};

// What the files' options are called in messages.
struct TlsOptionNames {
  std::string certificate = "tls.cert";
  std::string key = "tls.key";
  std::string ca = "tls.ca";
};

struct TlsContents {
  std::string identity;  // key and chain; empty where there is none
  std::string ca;        // empty where there is none
  // When the first certificate of the chain expires, and the last one of the authorities.
  std::time_t certificate_expires = 0;
  std::time_t ca_expires = 0;

  friend bool operator==(const TlsContents&, const TlsContents&) = default;
};

// INVALID_ARGUMENT in one line that names option and file: missing, unreadable, no PEM, expired or
// not valid yet at `now`, or a key of another certificate. Key and certificate come together.
[[nodiscard]] absl::StatusOr<TlsContents> ReadTlsFiles(const TlsFiles& files,
                                                       const TlsOptionNames& names,
                                                       std::time_t now);

}  // namespace nibble
