#include "base/header_blocks.h"

#include <algorithm>

namespace nibble {
namespace {

// RFC 9113, 4.1 and 6.
constexpr uint8_t kHeaders = 1;
constexpr uint8_t kContinuation = 9;
constexpr uint8_t kEndHeaders = 4;

}  // namespace

bool HeaderBlocks::Take(std::span<const uint8_t> bytes) {
  while (!bytes.empty()) {
    if (skip_ > 0) {
      const size_t skipped = std::min(skip_, bytes.size());
      skip_ -= skipped;
      bytes = bytes.subspan(skipped);
      continue;
    }
    header_[header_bytes_++] = bytes.front();
    bytes = bytes.subspan(1);
    if (header_bytes_ == kFrameHeaderBytes && !BeginFrame()) return false;
  }
  return true;
}

bool HeaderBlocks::BeginFrame() {
  header_bytes_ = 0;
  skip_ = size_t{header_[0]} << 16 | size_t{header_[1]} << 8 | header_[2];
  const uint8_t type = header_[3];
  if (type != kHeaders && type != kContinuation) return true;
  block_bytes_ += skip_;
  ++block_frames_;
  if (block_bytes_ > bytes_max_ || block_frames_ > kFramesMax) return false;
  if ((header_[4] & kEndHeaders) != 0) block_bytes_ = 0, block_frames_ = 0;
  return true;
}

}  // namespace nibble
