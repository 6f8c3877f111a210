// How every client command reaches its server: address, TLS and key.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "base/config.h"
#include "base/tls_source.h"

namespace nibble::cli {

struct ConnectionOptions {
  std::string server = "127.0.0.1:50051";
  bool tls = false;  // any of the files says so too
  TlsFiles tls_files;
  std::string tls_name;  // in the server's certificate; empty = the address's
  std::string api_key;
};

// Declares them in the parser's current group. Borrowed until the parser has run.
void DeclareConnectionOptions(ConfigParser* parser, ConnectionOptions* options);

struct Connection {
  std::unique_ptr<TlsSource> tls;  // null: clear text
  std::shared_ptr<grpc::Channel> channel;
};

// Does not wait for the server. INVALID_ARGUMENT: a file or the key cannot be used; what it says
// never holds the key.
[[nodiscard]] absl::StatusOr<Connection> Connect(const ConnectionOptions& options);

// Shows the key with this call.
void AddKey(const ConnectionOptions& options, grpc::ClientContext* context);

}  // namespace nibble::cli
