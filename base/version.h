// Which build this is.
#pragma once

#include <string>
#include <string_view>

namespace nibble {

struct BuildInfo {
  std::string_view version;       // "0.1.0"
  std::string_view git_revision;  // abbreviated commit, "-dirty" where files differ, or "unknown"
  std::string_view compiler;      // "GNU 12.2.0"
  std::string_view build_type;    // "Release"
  std::string_view sanitizers;    // empty in ordinary builds
};

[[nodiscard]] const BuildInfo& GetBuildInfo();

// "nibble-worker 0.1.0 (3572da1, GNU 12.2.0, Release)"
[[nodiscard]] std::string VersionLine(std::string_view program);

}  // namespace nibble
