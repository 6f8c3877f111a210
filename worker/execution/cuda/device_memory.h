// Device and pinned host memory, and CUDA errors as statuses.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/status.h"

namespace nibble::execution {

// OK, or INTERNAL with `what` and CUDA's name for the error; RESOURCE_EXHAUSTED for memory.
[[nodiscard]] absl::Status CudaStatus(cudaError_t error, std::string_view what);

// Memory of the current device. Owned; freed together. One thread.
//
// A counting arena allocates nothing and gives null pointers: the code that allocates is run over
// it to plan, so that a plan is what will be allocated, to the byte.
class DeviceArena {
 public:
  enum class Mode : uint8_t { kAllocate, kCount };
  explicit DeviceArena(Mode mode = Mode::kAllocate) : mode_(mode) {}
  DeviceArena(const DeviceArena&) = delete;
  DeviceArena& operator=(const DeviceArena&) = delete;
  ~DeviceArena();

  // 256-byte aligned, zeroed. RESOURCE_EXHAUSTED names the bytes that were asked for.
  template <typename T>
  [[nodiscard]] absl::StatusOr<T*> Allocate(int64_t count) {
    ASSIGN_OR_RETURN(void* data, AllocateBytes(count * static_cast<int64_t>(sizeof(T))));
    return static_cast<T*>(data);
  }
  // Takes `bytes` in one piece, from which Allocate gives as long as they last: the driver rounds
  // every piece up to 2 MiB. REQUIRES: nothing has been allocated.
  [[nodiscard]] absl::Status Reserve(int64_t bytes);
  // Of all allocations, each rounded up to 256.
  [[nodiscard]] int64_t bytes() const { return bytes_; }
  [[nodiscard]] bool counting() const { return mode_ == Mode::kCount; }

 private:
  [[nodiscard]] absl::StatusOr<void*> AllocateBytes(int64_t bytes);
  [[nodiscard]] absl::StatusOr<uint8_t*> TakePiece(int64_t bytes);

  const Mode mode_;
  std::vector<void*> pieces_;
  uint8_t* reserved_ = nullptr;  // what is left of it
  int64_t reserved_bytes_ = 0;
  int64_t bytes_ = 0;
};

// Page-locked host memory, which copies to and from the device run beside kernels for.
class PinnedMemory {
 public:
  PinnedMemory() = default;
  PinnedMemory(PinnedMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  PinnedMemory& operator=(PinnedMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~PinnedMemory();
  [[nodiscard]] static absl::StatusOr<PinnedMemory> Allocate(int64_t bytes);

  template <typename T>
  [[nodiscard]] T* as() const {
    return static_cast<T*>(data_);
  }
  [[nodiscard]] int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace nibble::execution
