// What a client of an HTTP/2 server sends, looked at for header blocks that have no end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace nibble {

// One connection's. Not thread-safe.
class HeaderBlocks {
 public:
  // Of a block, as it is encoded. One that fits its bound comes in one frame or in two; each of
  // many may be empty.
  static constexpr int kFramesMax = 16;

  explicit HeaderBlocks(size_t bytes_max) : bytes_max_(bytes_max) {}

  // The bytes after those of the call before. False once a frame says that its block will be too
  // long, whether or not what it announces has come.
  [[nodiscard]] bool Take(std::span<const uint8_t> bytes);

 private:
  static constexpr size_t kPrefaceBytes = 24;
  static constexpr size_t kFrameHeaderBytes = 9;

  [[nodiscard]] bool BeginFrame();

  const size_t bytes_max_;
  size_t skip_ = kPrefaceBytes;  // until the next frame's header
  uint8_t header_[kFrameHeaderBytes] = {};
  size_t header_bytes_ = 0;  // of header_ that are there
  size_t block_bytes_ = 0;   // of the block that has not ended
  int block_frames_ = 0;
};

}  // namespace nibble
