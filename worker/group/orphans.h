// Ranks of an earlier group that have outlived their supervisor: they hold memory, and a device.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

namespace nibble::group {

struct Orphan {
  pid_t pid = 0;
  int64_t resident_bytes = 0;
};

// Processes that are a rank by their command line and whose parent is no nibble-worker. `proc` is
// /proc, or a folder that plays it.
[[nodiscard]] std::vector<Orphan> FindOrphans(const std::string& proc = "/proc");

}  // namespace nibble::group
