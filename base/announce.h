// A small JSON file that says where a program listens, for whoever started it with port 0.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"

namespace nibble {

// Writes {"grpc": "127.0.0.1:1234", "metrics": "127.0.0.1:5678"} to `path` in one step (a new file
// renamed over it): a reader sees all of it or nothing. Called once, when everything listens and
// is ready. The entries stand in the given order; values are strings.
[[nodiscard]] absl::Status WriteAnnouncement(
    const std::string& path, const std::vector<std::pair<std::string, std::string>>& entries);

}  // namespace nibble
