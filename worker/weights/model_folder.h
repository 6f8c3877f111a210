// The only way to a model's files: by plain name, and never out of the folder.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "base/owned_fd.h"

namespace nibble::weights {

// A folder of the Hugging Face cache, …/models--ORG--NAME/snapshots/REVISION, holds symbolic links
// into the blobs/ two folders up: there, and only there, files may also lie anywhere in that
// models--ORG--NAME. Every other folder is its own bound.
//
// Thread-safe.
class ModelFolder {
 public:
  ModelFolder() = default;
  // NOT_FOUND or FAILED_PRECONDITION names the folder.
  [[nodiscard]] static absl::StatusOr<ModelFolder> Open(const std::string& path);

  // A regular file, open for reading. The name holds no '/'; a symbolic link that leads out of the
  // bound is refused (INVALID_ARGUMENT). NOT_FOUND when absent.
  [[nodiscard]] absl::StatusOr<OwnedFd> OpenFile(std::string_view name) const;

  // The whole file. RESOURCE_EXHAUSTED when longer than size_max.
  [[nodiscard]] absl::StatusOr<std::string> ReadFile(std::string_view name, int64_t size_max) const;

 private:
  OwnedFd bound_;        // nothing above it is ever opened
  std::string beneath_;  // the folder in it, with a '/' at the end; empty where they are the same
};

}  // namespace nibble::weights
