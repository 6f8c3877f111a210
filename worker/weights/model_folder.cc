#include "worker/weights/model_folder.h"

#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <optional>

#include "base/status.h"
#include "worker/model/message.h"
#include "worker/weights/printable.h"

namespace nibble::weights {
namespace {

using model::Message;

// O_NONBLOCK: a FIFO in the folder must not hang the start.
constexpr int kOpenFlags = O_RDONLY | O_CLOEXEC | O_NONBLOCK;

int OpenBeneath(int folder, const std::string& name) {
  open_how how{};
  how.flags = kOpenFlags;
  how.resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS;
  const auto fd = static_cast<int>(syscall(SYS_openat2, folder, name.c_str(), &how, sizeof(how)));
  if (fd >= 0 || (errno != ENOSYS && errno != EPERM)) return fd;
  // Kernels before 5.6 and old seccomp profiles lack openat2: then no symbolic link at all.
  return openat(folder, name.c_str(), kOpenFlags | O_NOFOLLOW);
}

struct HubFolder {
  std::string bound;    // …/models--ORG--NAME
  std::string beneath;  // snapshots/REVISION/
};

// Where the path leads to a snapshot of the Hugging Face cache.
std::optional<HubFolder> HubFolderOf(const std::string& path) {
  std::error_code error;
  const std::filesystem::path folder = std::filesystem::canonical(path, error);
  const std::filesystem::path snapshots = folder.parent_path();
  const std::filesystem::path bound = snapshots.parent_path();
  if (error || snapshots.filename() != "snapshots" ||
      !bound.filename().string().starts_with("models--")) {
    return std::nullopt;
  }
  return HubFolder{.bound = bound.string(),
                   .beneath = "snapshots/" + folder.filename().string() + "/"};
}

absl::Status OpenError(std::string_view name, int error) {
  if (error == ENOENT) return absl::NotFoundError(Message(Printable(name), " does not exist"));
  if (error == EXDEV || error == ELOOP) {
    return absl::InvalidArgumentError(
        Message(Printable(name),
                " is a symbolic link that leaves the model folder; allowed: files of the folder "
                "(cp -L makes them)"));
  }
  return absl::FailedPreconditionError(
      Message(Printable(name), " cannot be opened: ", std::strerror(error)));
}

}  // namespace

absl::StatusOr<ModelFolder> ModelFolder::Open(const std::string& path) {
  ModelFolder folder;
  std::string bound = path;
  if (const auto hub = HubFolderOf(path)) {
    bound = hub->bound;
    folder.beneath_ = hub->beneath;
  }
  const int fd = open(bound.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) {
    const int error = errno;
    const std::string message =
        Message("model folder ", Printable(path), ": ", std::strerror(error));
    return error == ENOENT ? absl::NotFoundError(message) : absl::FailedPreconditionError(message);
  }
  folder.bound_ = OwnedFd(fd);
  return folder;
}

absl::StatusOr<OwnedFd> ModelFolder::OpenFile(std::string_view name) const {
  if (name.empty() || name == "." || name == ".." || name.find('/') != std::string_view::npos ||
      name.find('\0') != std::string_view::npos) {
    return absl::InvalidArgumentError(
        Message(Printable(name), " is not the name of a file in the model folder"));
  }
  OwnedFd file(OpenBeneath(bound_.get(), beneath_ + std::string(name)));
  if (file.get() < 0) return OpenError(name, errno);
  struct stat status {};
  if (fstat(file.get(), &status) != 0) return OpenError(name, errno);
  if (!S_ISREG(status.st_mode)) {
    return absl::InvalidArgumentError(Message(Printable(name), " is not a regular file"));
  }
  return file;
}

absl::StatusOr<std::string> ModelFolder::ReadFile(std::string_view name, int64_t size_max) const {
  ASSIGN_OR_RETURN(const OwnedFd file, OpenFile(name));
  std::string text;
  char buffer[1 << 16];
  for (;;) {
    const ssize_t count = read(file.get(), buffer, sizeof(buffer));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return OpenError(name, errno);
    if (count == 0) return text;
    text.append(buffer, static_cast<size_t>(count));
    if (static_cast<int64_t>(text.size()) > size_max) {
      return absl::ResourceExhaustedError(
          Message(Printable(name), " is longer than ", size_max, " bytes"));
    }
  }
}

}  // namespace nibble::weights
