// A folder that appears under its name only when it is complete.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace nibble::quantize {

// Files are made in a folder beside the final one, "NAME.partial-XXXXXX"; Commit() renames it.
// Without Commit() the destructor removes it with all that is in it. One thread.
class OutputFolder {
 public:
  // ALREADY_EXISTS where `path` is anything but an empty folder.
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<OutputFolder>> Create(
      const std::string& path);
  ~OutputFolder();
  OutputFolder(const OutputFolder&) = delete;
  OutputFolder& operator=(const OutputFolder&) = delete;

  // Where a file of that name is to be made.
  [[nodiscard]] std::string PathOf(std::string_view name) const;
  // Makes a whole file and flushes it.
  [[nodiscard]] absl::Status WriteFile(std::string_view name, std::string_view text) const;
  // Flushes the folder and gives it its name.
  [[nodiscard]] absl::Status Commit();

 private:
  OutputFolder() = default;

  std::string final_path_;
  std::string partial_path_;  // empty after Commit()
};

}  // namespace nibble::quantize
