#include "worker/group/shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace nibble::group {
namespace {

constexpr int kSizeSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

absl::Status NoMemory(const char* name, size_t bytes) {
  return absl::ResourceExhaustedError(
      absl::StrCat("no ", bytes, " bytes of shared memory for ", name, ": ", std::strerror(errno)));
}

}  // namespace

absl::StatusOr<SharedMemory> SharedMemory::Create(const char* name, size_t bytes) {
  const int fd = ::memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) return NoMemory(name, bytes);
  SharedMemory memory(fd, bytes);  // closes fd from here on
  // Allocated now: a page that cannot be had later is a SIGBUS.
  if (::ftruncate(fd, static_cast<off_t>(bytes)) != 0 ||
      ::posix_fallocate(fd, 0, static_cast<off_t>(bytes)) != 0 ||
      ::fcntl(fd, F_ADD_SEALS, kSizeSeals) != 0) {
    return NoMemory(name, bytes);
  }
  RETURN_IF_ERROR(memory.Map());
  return memory;
}

absl::StatusOr<SharedMemory> SharedMemory::Attach(int fd, size_t bytes) {
  SharedMemory memory(fd, bytes);
  struct stat info {};
  const int seals = ::fcntl(fd, F_GET_SEALS);
  if (::fstat(fd, &info) != 0 || info.st_size != static_cast<off_t>(bytes) || seals < 0 ||
      (seals & kSizeSeals) != kSizeSeals) {
    return absl::InvalidArgumentError(
        absl::StrCat("descriptor ", fd, " is no shared memory of ", bytes, " bytes"));
  }
  RETURN_IF_ERROR(memory.Map());
  return memory;
}

absl::Status SharedMemory::Map() {
  void* const data = ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
  if (data == MAP_FAILED) return NoMemory("a mapping", bytes_);
  data_ = data;
  return absl::OkStatus();
}

SharedMemory::~SharedMemory() {
  if (data_ != nullptr) ::munmap(data_, bytes_);
  if (fd_ >= 0) ::close(fd_);
}

}  // namespace nibble::group
