// Matrices whose stored bytes the device packs by itself: they are sent as they lie in the file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/cuda/element.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/shard.h"

namespace nibble::execution {

// `lines` runs of bytes in a mapped file, `stride` apart. Borrowed from the checkpoint.
struct StoredBlock {
  const std::byte* from = nullptr;
  int64_t lines = 0;
  int64_t line_bytes = 0;
  int64_t stride = 0;
  [[nodiscard]] int64_t bytes() const { return lines * line_bytes; }
};
// Lines [first, first + count) of the block, one behind the other.
void CopyLines(const StoredBlock& block, int64_t first, int64_t count, std::byte* to);

struct StoredPart {
  std::string name;         // of the tensor that a message names
  int32_t rows = 0;         // of the fused matrix
  StoredBlock values;       // AutoAWQ's qweight [columns, rows / 8], or fp16 [rows, columns]
  StoredBlock zeros = {};   // [columns / group, rows / 8]
  StoredBlock scales = {};  // fp16 [columns / group, rows]
};
struct StoredMatrix {
  int32_t rows = 0;
  int32_t columns = 0;
  int32_t group = 0;  // 0 = dense fp16, then there is one part
  std::vector<StoredPart> parts = {};
};

enum class FusedMatrix : uint8_t { kQkv, kO, kGateUp, kDown };

// A rank's share of a layer's matrix. Nothing where the host must read it: layouts other than
// AutoAWQ's gemm, scales other than fp16, biases, groups that are not packed as they are stored,
// and what DescribeLinear refuses.
[[nodiscard]] std::optional<StoredMatrix> FindStored(const weights::Checkpoint& checkpoint,
                                                     const weights::RankShare& share, int32_t layer,
                                                     FusedMatrix which);
// The head's share of the vocabulary and the whole embedding, where they are dense and of the
// element type.
[[nodiscard]] std::optional<StoredMatrix> FindStoredHead(const weights::Checkpoint& checkpoint,
                                                         const weights::RankShare& share,
                                                         cuda::Element element);
[[nodiscard]] std::optional<StoredMatrix> FindStoredEmbedding(const weights::Checkpoint& checkpoint,
                                                              cuda::Element element);

}  // namespace nibble::execution
