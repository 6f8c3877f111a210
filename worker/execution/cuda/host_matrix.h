// Matrices of a checkpoint as they are sent to the device: as they lie in the file where the device
// can pack them so, else read and narrowed by several threads ahead of the one that sends them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <future>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cuda/element.h"
#include "worker/execution/cuda/stored_matrix.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/shard.h"

namespace nibble::execution {

// Logical values: q, zeros and scales where group is not 0, else dense. Numbers as bits: scales
// fp16, dense and bias of the element type.
struct HostMatrix {
  int32_t rows = 0;
  int32_t columns = 0;
  int32_t group = 0;
  std::optional<StoredMatrix> stored = {};  // in the place of all that follows
  std::vector<uint8_t> q = {}, zeros = {};
  std::vector<uint16_t> scales = {}, dense = {};
  std::vector<uint16_t> bias = {};  // in packed order; empty = none
};

// INVALID_ARGUMENT names `name` and a value beyond the type.
[[nodiscard]] absl::StatusOr<std::vector<uint16_t>> Narrow(std::span<const float> values,
                                                           cuda::Element element,
                                                           std::string_view name);

// A rank's matrices in the order in which they are sent: qkv, o, gate and up, down of each layer,
// then the head, then the embedding. One thread.
class MatrixQueue {
 public:
  // `checkpoint` and `share` outlive the queue. `stored`: whether matrices may stay as they are
  // stored.
  MatrixQueue(const weights::Checkpoint& checkpoint, const weights::RankShare& share,
              cuda::Element element, bool stored);
  ~MatrixQueue();

  // Of the stored matrices, in the order in which Next gives them: of each part values, zeros,
  // scales.
  [[nodiscard]] std::vector<StoredBlock> StoredBlocks() const;

  // REQUIRES: not the end.
  [[nodiscard]] absl::StatusOr<HostMatrix> Next();

 private:
  using Task = std::function<absl::StatusOr<HostMatrix>()>;
  void Add(std::optional<StoredMatrix> stored, Task task);
  void StartMore();

  std::vector<std::optional<StoredMatrix>> stored_;  // of every matrix
  std::vector<Task> tasks_;                          // of those that are not stored
  size_t given_ = 0;
  size_t started_ = 0;  // of tasks_
  size_t ahead_max_;
  std::deque<std::future<absl::StatusOr<HostMatrix>>> running_;
};

}  // namespace nibble::execution
