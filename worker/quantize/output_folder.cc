#include "worker/quantize/output_folder.h"
#include "base/owned_fd.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "base/status.h"
#include "worker/model/message.h"
#include "worker/weights/model_folder.h"
#include "worker/weights/printable.h"

namespace nibble::quantize {
namespace {

using model::Message;
using weights::Printable;

absl::Status PathError(const std::string& path, std::string_view what, int error) {
  const std::string message = Message(Printable(path), ": ", what, ": ", std::strerror(error));
  return error == ENOSPC || error == EDQUOT ? absl::ResourceExhaustedError(message)
                                            : absl::FailedPreconditionError(message);
}

absl::Status FlushFolder(const std::string& path) {
  const OwnedFd folder(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (folder.get() < 0 || fsync(folder.get()) != 0) {
    return PathError(path, "cannot be flushed", errno);
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<OutputFolder>> OutputFolder::Create(const std::string& path) {
  namespace fs = std::filesystem;
  std::string name = path;
  while (name.size() > 1 && name.back() == '/') name.pop_back();
  std::error_code error;
  const bool exists = fs::exists(name, error);
  if (exists && !(fs::is_directory(name, error) && fs::is_empty(name, error))) {
    return absl::AlreadyExistsError(
        Message(Printable(name), " exists; allowed: a new or an empty folder"));
  }
  std::string partial = name + ".partial-XXXXXX";
  if (mkdtemp(partial.data()) == nullptr) return PathError(partial, "cannot be made", errno);
  std::unique_ptr<OutputFolder> folder(new OutputFolder());
  folder->final_path_ = name;
  folder->partial_path_ = partial;
  // mkdtemp's folders are for their owner alone; a model folder is as readable as any other.
  const mode_t mask = umask(0);
  umask(mask);
  if (chmod(partial.c_str(), 0777 & ~mask) != 0) {
    return PathError(partial, "cannot be made readable", errno);
  }
  return folder;
}

OutputFolder::~OutputFolder() {
  if (partial_path_.empty()) return;
  std::error_code ignored;
  std::filesystem::remove_all(partial_path_, ignored);
}

std::string OutputFolder::PathOf(std::string_view name) const {
  return Message(partial_path_, "/", name);
}

absl::Status OutputFolder::WriteFile(std::string_view name, std::string_view text) const {
  const std::string path = PathOf(name);
  const OwnedFd file(open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644));
  if (file.get() < 0) return PathError(path, "cannot be created", errno);
  while (!text.empty()) {
    const ssize_t count = write(file.get(), text.data(), text.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return PathError(path, "cannot be written", errno);
    text.remove_prefix(static_cast<size_t>(count));
  }
  if (fsync(file.get()) != 0) return PathError(path, "cannot be flushed", errno);
  return absl::OkStatus();
}

absl::Status OutputFolder::Commit() {
  RETURN_IF_ERROR(FlushFolder(partial_path_));
  if (std::rename(partial_path_.c_str(), final_path_.c_str()) != 0) {
    return PathError(final_path_, "cannot be given its name", errno);
  }
  partial_path_.clear();
  const std::filesystem::path parent = std::filesystem::path(final_path_).parent_path();
  return FlushFolder(parent.empty() ? "." : parent.string());
}

}  // namespace nibble::quantize
