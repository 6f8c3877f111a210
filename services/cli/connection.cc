#include "services/cli/connection.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "base/host_port.h"
#include "base/status.h"

namespace nibble::cli {
namespace {

constexpr int kMessageBytesMax = 64 << 20;

// What does not leave this machine goes through no proxy, whatever the environment says.
bool IsLocal(const std::string& server) {
  if (absl::StartsWith(server, "unix:") || absl::StartsWith(server, "unix-abstract:")) return true;
  absl::string_view address = server;
  for (const char* scheme : {"dns:///", "ipv4:", "ipv6:"}) {
    if (absl::ConsumePrefix(&address, scheme)) break;
  }
  const auto where = ParseHostPort(std::string(address));
  return where.ok() && IsLoopbackHost(where->host);
}

}  // namespace

void DeclareConnectionOptions(ConfigParser* parser, ConnectionOptions* options) {
  parser->String("server", &options->server, "Address of the gateway");
  parser->Bool("tls", &options->tls, "Speak TLS; the options below say so too");
  parser->String("tls.ca", &options->tls_files.ca,
                 "PEM file of who signs the server's certificate; empty: the system's");
  parser->String("tls.cert", &options->tls_files.certificate,
                 "PEM file of the certificate to show");
  parser->String("tls.key", &options->tls_files.key, "PEM file of its key");
  parser->String("tls.name", &options->tls_name,
                 "Name in the server's certificate; empty: the host of its address");
  parser->String("api_key", &options->api_key,
                 "Key to show; better NIBBLE_API_KEY, which other users cannot see");
}

absl::StatusOr<Connection> Connect(const ConnectionOptions& options) {
  if (!std::all_of(options.api_key.begin(), options.api_key.end(), absl::ascii_isgraph)) {
    return absl::InvalidArgumentError("api_key has characters that no key has");
  }
  Connection connection;
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMessageBytesMax);
  if (IsLocal(options.server)) arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  std::shared_ptr<grpc::ChannelCredentials> credentials = grpc::InsecureChannelCredentials();
  if (options.tls || options.tls_files.any() || !options.tls_name.empty()) {
    ASSIGN_OR_RETURN(connection.tls, TlsSource::Open({.files = options.tls_files}));
    credentials = connection.tls->ChannelCredentials();
    if (!options.tls_name.empty()) {
      arguments.SetString(GRPC_SSL_TARGET_NAME_OVERRIDE_ARG, options.tls_name);
    }
  }
  connection.channel = grpc::CreateCustomChannel(options.server, credentials, arguments);
  return connection;
}

void AddKey(const ConnectionOptions& options, grpc::ClientContext* context) {
  if (options.api_key.empty()) return;
  context->AddMetadata("authorization", absl::StrCat("Bearer ", options.api_key));
}

}  // namespace nibble::cli
