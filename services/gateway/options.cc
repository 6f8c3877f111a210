#include "services/gateway/options.h"

#include <set>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/host_port.h"
#include "base/log_options.h"
#include "base/status.h"
#include "base/tls_options.h"

namespace nibble::gateway {
namespace {

absl::Status CheckAddress(const char* key, const std::string& value, bool unix_too) {
  if (unix_too && absl::StartsWith(value, "unix:") && value.size() > 5) return absl::OkStatus();
  if (ParseHostPort(value).ok()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(key, " is \"", value, "\"; allowed: host:port",
                                                 unix_too ? " or unix:PATH" : ""));
}

}  // namespace

void DeclareOptions(ConfigParser* parser, ProgramOptions* options) {
  using std::chrono::hours;
  using std::chrono::milliseconds;
  GatewayOptions& gateway = options->gateway;
  parser->Group("Listening");
  parser->String("listen", &gateway.listen, "gRPC for clients: host:port or unix:PATH");
  parser->String("metrics_listen", &gateway.metrics_listen,
                 "/metrics, /healthz and /readyz: host:port; empty: none");
  parser->Bool("metrics_vllm_names", &gateway.metrics_vllm_names,
               "vLLM's names beside nibble's, on /metrics");
  parser->String("admin_listen", &gateway.admin_listen,
                 "gRPC for operators: host:port or unix:PATH; empty: none");
  parser->String("announce", &options->announce,
                 "File that gets the addresses once everything listens");
  parser->Group("Workers");
  parser->List("groups", &gateway.groups, "Leaders of worker groups: host:port or unix:PATH each")
      .Required();
  parser->Choice<SamplingSource>(
      "sampling_defaults", &gateway.sampling,
      {{"model", SamplingSource::kModel}, {"nibble", SamplingSource::kNibble}},
      "Whose defaults fill in unset sampling parameters");
  parser->Group("Security");
  DeclareServerTlsOptions(parser, &gateway.tls);
  parser->String("groups_tls.ca", &gateway.groups_tls.ca,
                 "PEM file of who signs the groups' certificates; empty: no TLS towards them");
  parser->String("groups_tls.cert", &gateway.groups_tls.certificate,
                 "PEM file of the certificate that groups are shown");
  parser->String("groups_tls.key", &gateway.groups_tls.key, "PEM file of its key");
  parser->String("groups_tls.name", &gateway.groups_tls_name,
                 "Name in the groups' certificates; empty: the host of their address");
  parser->String("keys_file", &gateway.keys_file,
                 "TOML file of who may call (nibble keys new writes its lines); empty: anybody");
  parser->Group("Limits");
  parser->Int("max_concurrency", &gateway.limits.max_concurrency, {1, 1 << 20},
              "Calls in flight; more are refused");
  parser->Bytes("max_prompt_bytes", &options->max_prompt_bytes, {1, 4 << 20},
                "Text of one request");
  parser->Time("stall_timeout", &gateway.limits.stall_timeout, {milliseconds(100), hours(1)},
               "A client that reads nothing for this long is cut off");
  parser->Time("drain_timeout", &options->drain_timeout, {Duration::zero(), hours(24)},
               "After SIGTERM, what runs may take this long");
  parser->Group("Logging");
  DeclareLogOptions(parser, &options->log_level, &options->log_format);
  DeclareTerminationLog(parser, &options->termination_log);
}

absl::Status CompleteOptions(ProgramOptions* options) {
  GatewayOptions& gateway = options->gateway;
  RETURN_IF_ERROR(CheckAddress("listen", gateway.listen, /*unix_too=*/true));
  if (!gateway.metrics_listen.empty()) {
    RETURN_IF_ERROR(CheckAddress("metrics_listen", gateway.metrics_listen, /*unix_too=*/false));
  }
  if (!gateway.admin_listen.empty()) {
    RETURN_IF_ERROR(CheckAddress("admin_listen", gateway.admin_listen, /*unix_too=*/true));
  }
  std::set<std::string> seen;
  for (const std::string& group : gateway.groups) {
    RETURN_IF_ERROR(CheckAddress("groups", group, /*unix_too=*/true));
    if (!seen.insert(group).second) {
      return absl::InvalidArgumentError(
          absl::StrCat("groups has \"", group, "\" twice; allowed: each group once"));
    }
  }
  gateway.limits.prompt_bytes = static_cast<size_t>(options->max_prompt_bytes);
  return absl::OkStatus();
}

}  // namespace nibble::gateway
