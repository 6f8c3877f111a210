// A gateway before a leader over the fake executor, as they would run: two processes on loopback.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "tests/support/program.h"

namespace nibble::bench {

inline constexpr int32_t kBenchVocab = 376;  // of the tokenizer in tests/data

struct BenchServers {
  std::unique_ptr<testing::Program> leader;
  std::unique_ptr<testing::Program> gateway;
};

// The flags beside ports, tokenizer and the link between the two. Returns when the gateway has had
// time to take the group up; ends the bench where a server does not start.
[[nodiscard]] BenchServers StartBenchServers(const std::vector<std::string>& leader_flags,
                                             const std::vector<std::string>& gateway_flags);

}  // namespace nibble::bench
