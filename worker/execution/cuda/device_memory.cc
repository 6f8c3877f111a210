#include "worker/execution/cuda/device_memory.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace nibble::execution {
namespace {

constexpr int64_t kAlignment = 256;

}  // namespace

absl::Status CudaStatus(cudaError_t error, std::string_view what) {
  if (error == cudaSuccess) return absl::OkStatus();
  const std::string message = absl::StrCat(std::string(what), ": ", cudaGetErrorName(error), ", ",
                                           cudaGetErrorString(error));
  if (error == cudaErrorMemoryAllocation) return absl::ResourceExhaustedError(message);
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver) {
    return absl::FailedPreconditionError(message);
  }
  return absl::InternalError(message);
}

DeviceArena::~DeviceArena() {
  for (void* piece : pieces_) static_cast<void>(cudaFree(piece));
}

absl::StatusOr<uint8_t*> DeviceArena::TakePiece(int64_t bytes) {
  void* data = nullptr;
  RETURN_IF_ERROR(CudaStatus(cudaMalloc(&data, static_cast<size_t>(bytes)),
                             absl::StrCat("allocating ", bytes, " bytes on the device")));
  pieces_.push_back(data);
  RETURN_IF_ERROR(CudaStatus(cudaMemset(data, 0, static_cast<size_t>(bytes)), "clearing memory"));
  return static_cast<uint8_t*>(data);
}

absl::Status DeviceArena::Reserve(int64_t bytes) {
  CHECK(bytes_ == 0 && reserved_ == nullptr);
  if (counting() || bytes == 0) return absl::OkStatus();
  ASSIGN_OR_RETURN(reserved_, TakePiece(bytes));
  reserved_bytes_ = bytes;
  return absl::OkStatus();
}

absl::StatusOr<void*> DeviceArena::AllocateBytes(int64_t bytes) {
  if (bytes == 0) return nullptr;
  const int64_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  bytes_ += rounded;
  if (counting()) return nullptr;
  if (rounded > reserved_bytes_) return TakePiece(rounded);
  uint8_t* data = reserved_;
  reserved_ += rounded;
  reserved_bytes_ -= rounded;
  return data;
}

PinnedMemory::~PinnedMemory() {
  if (data_ != nullptr) static_cast<void>(cudaFreeHost(data_));
}

absl::StatusOr<PinnedMemory> PinnedMemory::Allocate(int64_t bytes) {
  PinnedMemory memory;
  RETURN_IF_ERROR(
      CudaStatus(cudaHostAlloc(&memory.data_, static_cast<size_t>(bytes), cudaHostAllocDefault),
                 absl::StrCat("allocating ", bytes, " bytes of pinned memory")));
  memory.bytes_ = bytes;
  return memory;
}

}  // namespace nibble::execution
