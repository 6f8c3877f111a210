#include "worker/collectives/shm_region.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <new>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace nibble::collectives {
namespace {

void* Map(int fd, size_t bytes) {
  return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
}

absl::Status NoRegion(const char* why) {
  return absl::InvalidArgumentError(
      absl::StrCat("the descriptor is no region of shared collectives: ", why));
}

}  // namespace

absl::StatusOr<ShmRegion> ShmRegion::Create(int32_t ranks, int64_t slot_bytes) {
  CHECK(ranks >= 1 && ranks <= kShmRanksMax);
  CHECK(slot_bytes >= 64 && slot_bytes % 64 == 0);
  const size_t bytes = Header::RegionBytes(ranks, slot_bytes);
  const int fd = memfd_create("nibble-collectives", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) {
    return absl::ErrnoToStatus(errno, "shared memory for collectives (memfd_create)");
  }
  // The seals keep a confused holder of the descriptor from cutting the memory away (SIGBUS).
  void* address = MAP_FAILED;
  if (ftruncate(fd, static_cast<off_t>(bytes)) == 0 &&
      fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0) {
    address = Map(fd, bytes);
  }
  if (address == MAP_FAILED) {
    const int error = errno;
    close(fd);
    return absl::ErrnoToStatus(error, absl::StrCat("shared memory for collectives of ", ranks,
                                                   " ranks: ", bytes, " bytes"));
  }
  auto* header = new (address) Header;
  header->ranks = ranks;
  header->slot_bytes = slot_bytes;
  header->magic = Header::kMagic;
  return ShmRegion(fd, header, bytes);
}

absl::StatusOr<ShmRegion> ShmRegion::Attach(int fd) {
  struct stat info {};
  if (fstat(fd, &info) != 0) {
    return absl::ErrnoToStatus(errno, "shared memory for collectives (fstat)");
  }
  if (info.st_size < static_cast<off_t>(sizeof(Header))) return NoRegion("too small");
  const auto bytes = static_cast<size_t>(info.st_size);
  void* address = Map(fd, bytes);
  if (address == MAP_FAILED) {
    return absl::ErrnoToStatus(errno, "shared memory for collectives (mmap)");
  }
  auto* header = std::launder(reinterpret_cast<Header*>(address));
  ShmRegion region(-1, header, bytes);
  if (header->magic != Header::kMagic) return NoRegion("magic number differs");
  if (header->ranks < 1 || header->ranks > kShmRanksMax || header->slot_bytes < 64 ||
      header->slot_bytes > (int64_t{1} << 32) ||
      Header::RegionBytes(header->ranks, header->slot_bytes) != bytes) {
    return NoRegion("its sizes do not add up");
  }
  return region;
}

ShmRegion::ShmRegion(ShmRegion&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)),
      header_(std::exchange(other.header_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)) {}

ShmRegion& ShmRegion::operator=(ShmRegion&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(header_, other.header_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

ShmRegion::~ShmRegion() {
  if (header_ != nullptr) munmap(header_, bytes_);
  if (fd_ >= 0) close(fd_);
}

int32_t ShmRegion::ranks() const { return header_->ranks; }

void ShmRegion::Abort() {
  header_->aborted.store(1);
  header_->event.Signal();
}

bool ShmRegion::aborted() const { return header_->aborted.load() != 0; }

}  // namespace nibble::collectives
