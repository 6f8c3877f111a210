// Text forms of sizes and times, as people write them in flags and files.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "base/clock.h"

namespace nibble {

// "24GiB", "1.5MiB", "512KiB", "1GB", "4096": binary suffixes are powers of 1024, decimal ones of
// 1000. nullopt when it is not such a text or does not fit.
[[nodiscard]] std::optional<int64_t> ParseBytes(std::string_view text);

// "24GiB", "1.50MiB": the largest binary suffix that leaves at least 1.
[[nodiscard]] std::string FormatBytes(int64_t bytes);

// "500ms", "10s", "2m", "1h", "250us", "0". nullopt when it is not such a text or does not fit.
[[nodiscard]] std::optional<Duration> ParseDuration(std::string_view text);

// "500ms", "10s", "90s" (not "1m30s"): the largest unit that gives a whole number.
[[nodiscard]] std::string FormatDuration(Duration duration);

}  // namespace nibble
