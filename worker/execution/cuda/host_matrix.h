// Matrices of a checkpoint as they are sent to the device, read and narrowed by several threads
// ahead of the one that sends them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <future>
#include <span>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/shard.h"

namespace nibble::execution {

// Logical values: q, zeros and scales where group is not 0, else dense. fp16 as bits.
struct HostMatrix {
  int32_t rows = 0;
  int32_t columns = 0;
  int32_t group = 0;
  std::vector<uint8_t> q = {}, zeros = {};
  std::vector<uint16_t> scales = {}, dense = {};
  std::vector<uint16_t> bias = {};  // in packed order; empty = none
};

// INVALID_ARGUMENT names `name` and a value beyond fp16.
[[nodiscard]] absl::StatusOr<std::vector<uint16_t>> NarrowToHalf(std::span<const float> values,
                                                                 std::string_view name);

// A rank's matrices in the order in which they are sent: qkv, o, gate and up, down of each layer,
// then the head, then the embedding. One thread.
class MatrixQueue {
 public:
  // `checkpoint` and `share` outlive the queue.
  MatrixQueue(const weights::Checkpoint& checkpoint, const weights::RankShare& share);
  ~MatrixQueue();

  // REQUIRES: not the end.
  [[nodiscard]] absl::StatusOr<HostMatrix> Next();

 private:
  using Task = std::function<absl::StatusOr<HostMatrix>()>;
  void StartMore();

  std::vector<Task> tasks_;
  size_t started_ = 0;
  size_t ahead_max_;
  std::deque<std::future<absl::StatusOr<HostMatrix>>> running_;
};

}  // namespace nibble::execution
