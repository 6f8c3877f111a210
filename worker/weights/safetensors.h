// safetensors files: mapped, and every byte of the header validated before use.
// Format: https://github.com/huggingface/safetensors#format
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace nibble::weights {

enum class TensorType : uint8_t {
  kF64,
  kF32,
  kF16,
  kBF16,
  kI64,
  kI32,
  kI16,
  kI8,
  kU64,
  kU32,
  kU16,
  kU8,
  kBool,
};

[[nodiscard]] std::string_view TensorTypeName(TensorType type);
[[nodiscard]] int64_t TensorTypeBytes(TensorType type);

// Borrowed from the file that it came from.
struct TensorView {
  TensorType type = TensorType::kF32;
  std::vector<int64_t> shape;
  std::span<const std::byte> data;
};

inline constexpr size_t kHeaderBytesMax = 16 << 20;
// A tensor takes 100 to 160 bytes of a header; a mixture of 256 experts has so many in all its
// files together.
inline constexpr size_t kTensorsMax = kHeaderBytesMax / 128;
inline constexpr int kHeaderDepthMax = 4;
inline constexpr size_t kTensorRankMax = 8;

// Immutable after Open(); thread-safe.
class SafetensorsFile {
 public:
  // Limits: header 16 MiB, 131 072 tensors, JSON depth 4, rank 8.
  // DATA_LOSS names the file, the tensor and what is wrong with it.
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<SafetensorsFile>> Open(
      const std::string& path);
  // The same for an open descriptor, which is only borrowed; `name` begins every message.
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<SafetensorsFile>> Map(
      int descriptor, const std::string& name);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  [[nodiscard]] const std::map<std::string, TensorView, std::less<>>& tensors() const {
    return tensors_;
  }
  [[nodiscard]] const std::map<std::string, std::string>& metadata() const { return metadata_; }
  [[nodiscard]] const std::string& name() const { return name_; }

 private:
  SafetensorsFile() = default;

  std::string name_;
  void* mapping_ = nullptr;
  size_t mapping_bytes_ = 0;
  std::map<std::string, TensorView, std::less<>> tensors_;
  std::map<std::string, std::string> metadata_;
};

// The header's checks alone, on bytes in memory: what the fuzzer drives. `file_bytes` is the whole
// file's length; the views of the returned tensors lie in `file`.
[[nodiscard]] absl::StatusOr<std::map<std::string, TensorView, std::less<>>> ParseSafetensors(
    std::span<const std::byte> file, std::map<std::string, std::string>* metadata);

}  // namespace nibble::weights
