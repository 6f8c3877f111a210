#include "worker/weights/safetensors.h"
#include "base/owned_fd.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <bit>
#include <cerrno>
#include <cstring>

#include "base/status.h"
#include "worker/model/message.h"
#include "worker/weights/model_folder.h"
#include "worker/weights/printable.h"
#include "worker/weights/safetensors_header.h"

namespace nibble::weights {
namespace {

using model::Message;

static_assert(std::endian::native == std::endian::little, "tensor data is little endian");

// Every byte of the data belongs to exactly one tensor.
absl::Status CheckCoverage(const std::vector<HeaderEntry>& entries, uint64_t data_bytes) {
  uint64_t position = 0;
  for (const HeaderEntry& entry : entries) {
    const auto tensor = [&entry] { return Message("tensor ", Printable(entry.name)); };
    if (entry.begin < position) {
      return absl::DataLossError(Message(tensor(), ": begins at byte ", entry.begin,
                                         ", inside the tensor before it, which ends at ",
                                         position));
    }
    if (entry.begin > position) {
      return absl::DataLossError(Message(tensor(), ": begins at byte ", entry.begin,
                                         ", after a hole from byte ", position));
    }
    if (entry.end > data_bytes) {
      return absl::DataLossError(Message(tensor(), ": ends at byte ", entry.end,
                                         "; the file holds ", data_bytes, " bytes of data"));
    }
    position = entry.end;
  }
  if (position != data_bytes) {
    return absl::DataLossError(Message("the last tensor ends at byte ", position,
                                       "; the file holds ", data_bytes, " bytes of data"));
  }
  return absl::OkStatus();
}

absl::Status Prefixed(const std::string& name, const absl::Status& status) {
  return absl::Status(status.code(), Message(name, ": ", status.message()));
}

}  // namespace

std::string_view TensorTypeName(TensorType type) {
  constexpr std::string_view kNames[] = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16",
                                         "I8",  "U64", "U32", "U16",  "U8",  "BOOL"};
  return kNames[static_cast<size_t>(type)];
}

int64_t TensorTypeBytes(TensorType type) {
  constexpr int64_t kBytes[] = {8, 4, 2, 2, 8, 4, 2, 1, 8, 4, 2, 1, 1};
  return kBytes[static_cast<size_t>(type)];
}

absl::StatusOr<std::map<std::string, TensorView, std::less<>>> ParseSafetensors(
    std::span<const std::byte> file, std::map<std::string, std::string>* metadata) {
  uint64_t header_bytes = 0;
  if (file.size() < sizeof(header_bytes)) {
    return absl::DataLossError(
        Message("the file has ", file.size(), " bytes; the header's length alone takes 8"));
  }
  std::memcpy(&header_bytes, file.data(), sizeof(header_bytes));
  if (header_bytes > kHeaderBytesMax) {
    return absl::DataLossError(
        Message("the header has ", header_bytes, " bytes; limit is ", kHeaderBytesMax));
  }
  if (header_bytes > file.size() - sizeof(header_bytes)) {
    return absl::DataLossError(Message("the header has ", header_bytes,
                                       " bytes; the file ends after ",
                                       file.size() - sizeof(header_bytes), " of them"));
  }
  const auto* text = reinterpret_cast<const char*>(file.data() + sizeof(header_bytes));
  ASSIGN_OR_RETURN(SafetensorsHeader header, ParseHeader({text, header_bytes}));
  const std::span<const std::byte> data = file.subspan(sizeof(header_bytes) + header_bytes);
  RETURN_IF_ERROR(CheckCoverage(header.entries, data.size()));
  std::map<std::string, TensorView, std::less<>> tensors;
  for (HeaderEntry& entry : header.entries) {
    tensors.emplace(std::move(entry.name),
                    TensorView{.type = entry.type,
                               .shape = std::move(entry.shape),
                               .data = data.subspan(entry.begin, entry.end - entry.begin)});
  }
  if (metadata != nullptr) *metadata = std::move(header.metadata);
  return tensors;
}

absl::StatusOr<std::unique_ptr<SafetensorsFile>> SafetensorsFile::Open(const std::string& path) {
  const OwnedFd file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.get() < 0) {
    const std::string message = Message(Printable(path), ": ", std::strerror(errno));
    return errno == ENOENT ? absl::NotFoundError(message) : absl::FailedPreconditionError(message);
  }
  return Map(file.get(), path);
}

absl::StatusOr<std::unique_ptr<SafetensorsFile>> SafetensorsFile::Map(int descriptor,
                                                                      const std::string& name) {
  struct stat status {};
  if (fstat(descriptor, &status) != 0 || !S_ISREG(status.st_mode)) {
    return absl::FailedPreconditionError(Message(name, ": is not a regular file"));
  }
  std::unique_ptr<SafetensorsFile> file(new SafetensorsFile());
  file->name_ = name;
  std::span<const std::byte> bytes;
  if (status.st_size > 0) {
    const auto size = static_cast<size_t>(status.st_size);
    void* mapping = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor, 0);
    if (mapping == MAP_FAILED) {
      return absl::FailedPreconditionError(
          Message(name, ": cannot be mapped: ", std::strerror(errno)));
    }
    file->mapping_ = mapping;
    file->mapping_bytes_ = size;
    bytes = {static_cast<const std::byte*>(mapping), size};
  }
  auto tensors = ParseSafetensors(bytes, &file->metadata_);
  if (!tensors.ok()) return Prefixed(name, tensors.status());
  file->tensors_ = *std::move(tensors);
  return file;
}

SafetensorsFile::~SafetensorsFile() {
  if (mapping_ != nullptr) munmap(mapping_, mapping_bytes_);
}

}  // namespace nibble::weights
