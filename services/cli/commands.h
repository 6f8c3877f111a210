// The commands of the program `nibble`. Each takes the arguments behind its name and returns the
// exit code.
#pragma once

#include <string>
#include <vector>

#include "base/config.h"

namespace nibble::cli {

[[nodiscard]] int RunServe(int argc, const char* const* argv);
[[nodiscard]] int RunChat(int argc, const char* const* argv);
[[nodiscard]] int RunGenerate(int argc, const char* const* argv);
[[nodiscard]] int RunDrain(int argc, const char* const* argv);
[[nodiscard]] int RunUndrain(int argc, const char* const* argv);
[[nodiscard]] int RunInspect(int argc, const char* const* argv);
[[nodiscard]] int RunPlan(int argc, const char* const* argv);
[[nodiscard]] int RunQuantize(int argc, const char* const* argv);
[[nodiscard]] int RunKeys(int argc, const char* const* argv);
[[nodiscard]] int RunFetch(int argc, const char* const* argv);
[[nodiscard]] int RunBench(int argc, const char* const* argv);

// A command's parser: one file of settings serves all commands, with a table for each.
[[nodiscard]] ConfigProgram CommandProgram(const std::string& command, std::string summary,
                                           std::string example);

}  // namespace nibble::cli
