// The figures of a bench as text for people and as records for programs.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "worker/execution/cpu/bench.h"

namespace nibble::cli {

[[nodiscard]] std::string BenchTable(const execution::BenchResult& result);

// An array of {metric, value, spread, threads, ranks, batch, prompt, isa, runs}; batch is 0 where
// none was decoded, prompt 0 where it does not matter.
[[nodiscard]] nlohmann::ordered_json BenchRecords(const execution::BenchResult& result);

}  // namespace nibble::cli
