#include "base/tls_options.h"

namespace nibble {

TlsOptionNames ServerTlsNames() {
  return {.certificate = "tls.cert", .key = "tls.key", .ca = "tls.client_ca"};
}

absl::Status CheckServerTls(const TlsFiles& files) {
  if (files.ca.empty() || !files.certificate.empty() || !files.key.empty()) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError("tls.cert is not set; it goes with tls.client_ca");
}

void DeclareServerTlsOptions(ConfigParser* parser, TlsFiles* files) {
  parser->String("tls.cert", &files->certificate,
                 "PEM file of the certificate that the gRPC ports show; empty: no TLS");
  parser->String("tls.key", &files->key, "PEM file of its key");
  parser->String("tls.client_ca", &files->ca,
                 "PEM file of who signs clients' certificates; empty: clients need none");
}

}  // namespace nibble
