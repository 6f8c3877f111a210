// What a process has used, from /proc.
#pragma once

#include <sys/types.h>

#include <cstdint>

namespace nibble::bench {

// Seconds of processor time.
[[nodiscard]] double CpuSeconds(pid_t pid);
// Bytes of memory that it holds now.
[[nodiscard]] int64_t RssBytes(pid_t pid);

}  // namespace nibble::bench
