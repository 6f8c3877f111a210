#include "base/announce.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"

namespace nibble {
namespace {

absl::Status Failed(const char* action, const std::string& path, int error) {
  return absl::InvalidArgumentError(
      absl::StrCat("announce file ", path, ": ", action, " failed: ", std::strerror(error)));
}

absl::Status WriteWhole(int fd, const std::string& path, const std::string& text) {
  size_t done = 0;
  while (done < text.size()) {
    const ssize_t written = ::write(fd, text.data() + done, text.size() - done);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return Failed("write", path, errno);
    done += static_cast<size_t>(written);
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status WriteAnnouncement(const std::string& path,
                               const std::vector<std::pair<std::string, std::string>>& entries) {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  for (const auto& [key, value] : entries) json[key] = value;
  const std::string text =
      json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";

  const std::string temporary = absl::StrCat(path, ".", ::getpid(), ".tmp");
  const int fd = ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) return Failed("open", path, errno);
  absl::Status status = WriteWhole(fd, path, text);
  if (::close(fd) != 0 && status.ok()) status = Failed("close", path, errno);
  if (status.ok() && ::rename(temporary.c_str(), path.c_str()) != 0) {
    status = Failed("rename", path, errno);
  }
  if (!status.ok()) ::unlink(temporary.c_str());
  return status;
}

}  // namespace nibble
