#include "worker/execution/cpu/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "kernels/layout/cpu_w4.h"

namespace nibble::execution {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kChunk = int64_t{64} << 20;

constexpr int64_t RoundUp(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace

MappedMemory::MappedMemory(int64_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  data_ = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  CHECK_MSG(data_ != MAP_FAILED, "out of address space");
  // Only a hint: without huge pages everything works, with more TLB misses.
  if (bytes >= 2 * kHugePage) madvise(data_, static_cast<size_t>(bytes), MADV_HUGEPAGE);
}

MappedMemory::MappedMemory(MappedMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

MappedMemory& MappedMemory::operator=(MappedMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

MappedMemory::~MappedMemory() {
  if (data_ != nullptr) munmap(data_, static_cast<size_t>(bytes_));
}

void* Arena::AllocateBytes(int64_t bytes) {
  CHECK(bytes >= 0);
  bytes = RoundUp(bytes, layout::kAlignment);
  bytes_ += bytes;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (chunks_.empty() || chunks_.back().bytes() - last_used_ < bytes) {
    chunks_.emplace_back(RoundUp(std::max(bytes, kChunk), kHugePage));
    last_used_ = 0;
  }
  void* piece = chunks_.back().as<char>() + last_used_;
  last_used_ += bytes;
  return piece;
}

}  // namespace nibble::execution
