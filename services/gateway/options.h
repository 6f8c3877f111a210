// The gateway program's configuration: flags, environment and file in one declaration.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "base/clock.h"
#include "base/config.h"
#include "services/gateway/server.h"

namespace nibble::gateway {

struct ProgramOptions {
  GatewayOptions gateway;
  int64_t max_prompt_bytes = 1 << 20;
  std::string announce;  // file that gets the addresses once everything listens; empty = none
  Duration drain_timeout = std::chrono::seconds(60);
  std::string log_level = "info";
  std::string log_format = "text";
  std::string termination_log;

  ProgramOptions() { gateway.metrics_listen = "127.0.0.1:9100"; }
};

void DeclareOptions(ConfigParser* parser, ProgramOptions* options);
// What one option alone cannot say; fills in what follows from others. INVALID_ARGUMENT names key,
// value and what is allowed.
[[nodiscard]] absl::Status CompleteOptions(ProgramOptions* options);

}  // namespace nibble::gateway
