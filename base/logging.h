// Logging: text or JSON lines on stderr through spdlog's default logger.
//
// Prompts, outputs, keys and paths given by clients are never logged.
#pragma once

#include <spdlog/spdlog.h>

#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace nibble {

struct LoggingOptions {
  std::string level = "info";   // trace, debug, info, warn, error or off
  std::string format = "text";  // text or json
  std::string process;          // "gateway", "leader", "rank 1": stands in every line
};

// Installs the default logger. Called once from main().
[[nodiscard]] absl::Status InitLogging(const LoggingOptions& options);

}  // namespace nibble
