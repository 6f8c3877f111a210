// Memory that the processes of a group share, without a name in any file system: a memfd, handed
// on as an inherited descriptor. Nothing is left behind when all of them are killed.
#pragma once

#include <cstddef>
#include <type_traits>
#include <utility>

#include "absl/status/statusor.h"
#include "base/status.h"

namespace nibble::group {

// A mapping of a whole memfd. Owns mapping and descriptor.
class SharedMemory {
 public:
  // Zeroed, close-on-exec, its size sealed. RESOURCE_EXHAUSTED when there is none to be had.
  [[nodiscard]] static absl::StatusOr<SharedMemory> Create(const char* name, size_t bytes);
  // INVALID_ARGUMENT when the descriptor is no such memory of that size. Takes the descriptor over.
  [[nodiscard]] static absl::StatusOr<SharedMemory> Attach(int fd, size_t bytes);

  SharedMemory(SharedMemory&& other) noexcept
      : fd_(std::exchange(other.fd_, -1)),
        data_(std::exchange(other.data_, nullptr)),
        bytes_(other.bytes_) {}
  SharedMemory& operator=(SharedMemory&&) = delete;
  ~SharedMemory();

  [[nodiscard]] int fd() const { return fd_; }
  [[nodiscard]] void* data() const { return data_; }

 private:
  SharedMemory(int fd, size_t bytes) : fd_(fd), bytes_(bytes) {}
  absl::Status Map();

  int fd_;
  void* data_ = nullptr;
  size_t bytes_;
};

// One T in such memory. All zero bytes is a valid T, and its members are atomics or written by one
// process before another is told.
template <typename T>
class SharedObject {
  static_assert(std::is_standard_layout_v<T> && std::is_trivially_destructible_v<T>);

 public:
  [[nodiscard]] static absl::StatusOr<SharedObject> Create(const char* name) {
    ASSIGN_OR_RETURN(SharedMemory memory, SharedMemory::Create(name, sizeof(T)));
    return SharedObject(std::move(memory));
  }
  [[nodiscard]] static absl::StatusOr<SharedObject> Attach(int fd) {
    ASSIGN_OR_RETURN(SharedMemory memory, SharedMemory::Attach(fd, sizeof(T)));
    return SharedObject(std::move(memory));
  }

  [[nodiscard]] T* get() const { return static_cast<T*>(memory_.data()); }
  T* operator->() const { return get(); }
  [[nodiscard]] int fd() const { return memory_.fd(); }

 private:
  explicit SharedObject(SharedMemory memory) : memory_(std::move(memory)) {}
  SharedMemory memory_;
};

}  // namespace nibble::group
