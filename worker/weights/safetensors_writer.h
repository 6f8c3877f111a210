// Writes one safetensors file whose tensors are all known before the first byte of data.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/owned_fd.h"
#include "worker/weights/safetensors.h"

namespace nibble::weights {

struct TensorPlan {
  std::string name;
  TensorType type = TensorType::kF16;
  std::vector<int64_t> shape;
  [[nodiscard]] int64_t bytes() const;
};

// Tensors lie in the order of the plan; the header is padded so that data begins at a multiple of
// 64. The bytes of the file depend on plan, metadata and data alone, not on the order of writes.
class SafetensorsWriter {
 public:
  // Creates the file, which must not exist. Errors name the path.
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<SafetensorsWriter>> Create(
      const std::string& path, const std::vector<TensorPlan>& plan,
      const std::map<std::string, std::string>& metadata);

  // Each tensor once; from several threads for different tensors. REQUIRES: a planned name, its
  // size.
  [[nodiscard]] absl::Status Write(std::string_view name, std::span<const std::byte> data);

  // After every tensor was written: the file is on disk.
  [[nodiscard]] absl::Status Finish();

 private:
  struct Place {
    int64_t offset = 0;  // in the file
    int64_t bytes = 0;
  };
  SafetensorsWriter() = default;
  [[nodiscard]] absl::Status WriteAt(std::span<const std::byte> data, int64_t offset) const;

  std::string path_;
  OwnedFd file_;
  std::map<std::string, Place, std::less<>> places_;
};

}  // namespace nibble::weights
