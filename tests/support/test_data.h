// Larger test data, found through NIBBLE_TEST_DATA (default: ../shared/data beside the source
// tree).
#pragma once

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <string>

namespace nibble::testing {

inline std::string SourceDir() {
  const char* dir = std::getenv("NIBBLE_SOURCE_DIR");
  return dir != nullptr ? dir : ".";
}

// The file or folder `relative` of the test data. Where it is absent, prints one line that says
// which tests did not run.
inline std::optional<std::string> TestData(const std::string& relative, const char* tests) {
  const char* root = std::getenv("NIBBLE_TEST_DATA");
  const std::string path =
      (root != nullptr ? std::string(root) : SourceDir() + "/../shared/data") + "/" + relative;
  if (std::filesystem::exists(path)) return path;
  std::fprintf(stderr, "NOT RUN: %s (no %s under NIBBLE_TEST_DATA)\n", tests, relative.c_str());
  return std::nullopt;
}

}  // namespace nibble::testing
