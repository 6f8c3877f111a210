// The options that every program with a gRPC port has for its TLS.
#pragma once

#include "absl/status/status.h"
#include "base/config.h"
#include "base/tls_files.h"

namespace nibble {

// What the files of a port are called.
[[nodiscard]] TlsOptionNames ServerTlsNames();

// INVALID_ARGUMENT where a client CA was given without a certificate of the port's own: nobody may
// take clear text for TLS. Looks at no file.
[[nodiscard]] absl::Status CheckServerTls(const TlsFiles& files);

// Declares tls.cert, tls.key and tls.client_ca in the parser's current group. The target is
// borrowed until the parser has run.
void DeclareServerTlsOptions(ConfigParser* parser, TlsFiles* files);

}  // namespace nibble
