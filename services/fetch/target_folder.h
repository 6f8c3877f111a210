// The folder that a fetch fills: FOLDER.partial beside it, which becomes FOLDER in one rename once
// every file in it is whole. One fetch at a time works on it; what it leaves half done the next
// one goes on with.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "base/owned_fd.h"

namespace nibble::fetch {

class TargetFolder {
 public:
  // Null where `folder` is whole already and came from `source`. Waits for another process that
  // fills it, and calls `waits` before. ALREADY_EXISTS: there is something else;
  // INVALID_ARGUMENT: there can be no such folder, or it is a mount itself, which no rename
  // reaches.
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<TargetFolder>> Open(
      std::string folder, const std::string& source, const std::function<void()>& waits);

  // Of the partial folder.
  [[nodiscard]] int descriptor() const { return directory_.get(); }
  // Bytes that its file system has for us.
  [[nodiscard]] int64_t FreeBytes() const;
  // Takes out every file but those of `names` (and their beginnings, NAME.part).
  [[nodiscard]] absl::Status RemoveOthers(const std::map<std::string, std::string>& names) const;
  // Writes what it is (SHA256SUMS, where it came from) and renames it. `sums`: SHA-256 by name.
  [[nodiscard]] absl::Status Finish(const std::string& source, const std::string& revision,
                                    const std::map<std::string, std::string>& sums);

 private:
  TargetFolder(std::string folder, OwnedFd directory)
      : folder_(std::move(folder)), directory_(std::move(directory)) {}

  std::string folder_;
  OwnedFd directory_;  // with the lock
};

}  // namespace nibble::fetch
