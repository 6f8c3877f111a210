#include "worker/weights/safetensors_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/check.h"
#include "base/status.h"
#include "nlohmann/json.hpp"
#include "worker/model/message.h"
#include "worker/weights/printable.h"

namespace nibble::weights {
namespace {

using model::Message;

constexpr size_t kDataAlignment = 64;
constexpr int kFileMode = 0644;

absl::Status FileError(const std::string& path, std::string_view what, int error) {
  const std::string message = Message(Printable(path), ": ", what, ": ", std::strerror(error));
  return error == ENOSPC || error == EDQUOT ? absl::ResourceExhaustedError(message)
                                            : absl::FailedPreconditionError(message);
}

}  // namespace

int64_t TensorPlan::bytes() const {
  int64_t count = TensorTypeBytes(type);
  for (const int64_t dimension : shape) count *= dimension;
  return count;
}

absl::StatusOr<std::unique_ptr<SafetensorsWriter>> SafetensorsWriter::Create(
    const std::string& path, const std::vector<TensorPlan>& plan,
    const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  int64_t position = 0;
  for (const TensorPlan& tensor : plan) {
    const int64_t end = position + tensor.bytes();
    header[tensor.name] = {{"dtype", TensorTypeName(tensor.type)},
                           {"shape", tensor.shape},
                           {"data_offsets", {position, end}}};
    position = end;
  }
  std::string text = header.dump();
  text.resize(
      (sizeof(uint64_t) + text.size() + kDataAlignment - 1) / kDataAlignment * kDataAlignment -
          sizeof(uint64_t),
      ' ');
  std::unique_ptr<SafetensorsWriter> writer(new SafetensorsWriter());
  writer->path_ = path;
  writer->file_ = OwnedFd(open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, kFileMode));
  if (writer->file_.get() < 0) return FileError(path, "cannot be created", errno);
  const uint64_t header_bytes = text.size();
  position = static_cast<int64_t>(sizeof(header_bytes) + text.size());
  for (const TensorPlan& tensor : plan) {
    const bool added = writer->places_.emplace(tensor.name, Place{position, tensor.bytes()}).second;
    CHECK_MSG(added, tensor.name);
    position += tensor.bytes();
  }
  text.insert(0, reinterpret_cast<const char*>(&header_bytes), sizeof(header_bytes));
  RETURN_IF_ERROR(writer->WriteAt(std::as_bytes(std::span(text)), 0));
  return writer;
}

absl::Status SafetensorsWriter::WriteAt(std::span<const std::byte> data, int64_t offset) const {
  while (!data.empty()) {
    const ssize_t count = pwrite(file_.get(), data.data(), data.size(), offset);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return FileError(path_, "cannot be written", errno);
    data = data.subspan(static_cast<size_t>(count));
    offset += count;
  }
  return absl::OkStatus();
}

absl::Status SafetensorsWriter::Write(std::string_view name, std::span<const std::byte> data) {
  const auto place = places_.find(name);
  CHECK_MSG(place != places_.end(), name);
  CHECK_MSG(static_cast<int64_t>(data.size()) == place->second.bytes, name);
  return WriteAt(data, place->second.offset);
}

absl::Status SafetensorsWriter::Finish() {
  if (fsync(file_.get()) != 0) return FileError(path_, "cannot be flushed", errno);
  return absl::OkStatus();
}

}  // namespace nibble::weights
