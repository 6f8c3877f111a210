#include "base/logging.h"

#include <spdlog/sinks/stdout_color_sinks.h>

#include <memory>

#include "absl/strings/str_cat.h"

namespace nibble {

absl::Status InitLogging(const LoggingOptions& options) {
  const auto level = spdlog::level::from_str(options.level);
  if (level == spdlog::level::off && options.level != "off") {
    return absl::InvalidArgumentError(absl::StrCat(
        "log.level is \"", options.level, "\"; allowed: trace, debug, info, warn, error, off"));
  }
  if (options.format != "text" && options.format != "json") {
    return absl::InvalidArgumentError(
        absl::StrCat("log.format is \"", options.format, "\"; allowed: text, json"));
  }
  auto logger = std::make_shared<spdlog::logger>(
      options.process, std::make_shared<spdlog::sinks::stderr_color_sink_mt>());
  logger->set_level(level);
  logger->set_pattern(options.format == "json"
                          ? R"({"time":"%Y-%m-%dT%H:%M:%S.%e%z","level":"%l","process":"%n",)"
                            R"("pid":%P,"message":"%v"})"
                          : "%Y-%m-%d %H:%M:%S.%e %^%-7l%$ %n: %v");
  logger->flush_on(spdlog::level::info);
  spdlog::set_default_logger(std::move(logger));
  return absl::OkStatus();
}

}  // namespace nibble
