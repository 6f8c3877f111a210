// Sends parts of mapped files to the device: threads copy them into pinned memory, ahead of the one
// that puts the transfers on a stream.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <future>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/execution/cuda/device_memory.h"
#include "worker/execution/cuda/stored_matrix.h"

namespace nibble::execution {

// One thread.
class BlockSender {
 public:
  // Starts to read; what the blocks point to outlives this.
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<BlockSender>> Create(
      std::vector<StoredBlock> blocks);
  ~BlockSender();
  BlockSender(const BlockSender&) = delete;
  BlockSender& operator=(const BlockSender&) = delete;

  // The next block, in the order of Create, to the device. REQUIRES: not the end; always the same
  // stream.
  [[nodiscard]] absl::Status SendNext(void* to, cudaStream_t stream);

 private:
  struct Piece {
    size_t block = 0;
    int64_t first_line = 0;
    int64_t lines = 0;
  };
  struct Slot {
    std::byte* data = nullptr;
    cudaEvent_t sent = nullptr;
    std::future<void> filled;
  };
  explicit BlockSender(std::vector<StoredBlock> blocks);
  [[nodiscard]] absl::Status StartMore();

  const std::vector<StoredBlock> blocks_;
  std::vector<Piece> pieces_;
  int64_t piece_bytes_ = 0;  // of the largest
  PinnedMemory pinned_;
  std::vector<Slot> slots_;  // piece i uses slot i % size
  size_t started_ = 0;
  size_t sent_ = 0;
};

}  // namespace nibble::execution
