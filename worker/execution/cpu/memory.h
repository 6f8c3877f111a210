// Anonymous memory straight from the kernel: zeroed, page-aligned, resident only where touched, and
// in huge pages where there is enough of it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace nibble::execution {

// Owns one mapping. Running out of address space is fatal, as it is for the heap: sizes are planned
// and checked against the budget before.
class MappedMemory {
 public:
  MappedMemory() = default;
  explicit MappedMemory(int64_t bytes);
  MappedMemory(MappedMemory&& other) noexcept;
  MappedMemory& operator=(MappedMemory&& other) noexcept;
  ~MappedMemory();

  [[nodiscard]] int64_t bytes() const { return bytes_; }
  template <typename T>
  [[nodiscard]] T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Hands out 64-byte aligned pieces of large mappings; all are freed together. Thread-safe.
class Arena {
 public:
  // Zeroed. The pieces' total is bytes().
  template <typename T>
  [[nodiscard]] T* Allocate(int64_t count) {
    return static_cast<T*>(AllocateBytes(count * static_cast<int64_t>(sizeof(T))));
  }
  // What was handed out, rounded up to the alignment.
  [[nodiscard]] int64_t bytes() const { return bytes_.load(); }

 private:
  [[nodiscard]] void* AllocateBytes(int64_t bytes);

  std::mutex mutex_;
  std::vector<MappedMemory> chunks_;
  int64_t last_used_ = 0;  // bytes of the last chunk
  std::atomic<int64_t> bytes_{0};
};

}  // namespace nibble::execution
