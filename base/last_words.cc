#include "base/last_words.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/logging.h"

namespace nibble {
namespace {

constexpr char kKubernetesFile[] = "/dev/termination-log";
constexpr size_t kBytesMax = 4096;  // what Kubernetes keeps

}  // namespace

std::string DefaultTerminationLog() {
  return ::access(kKubernetesFile, W_OK) == 0 ? kKubernetesFile : "";
}

void WriteLastWords(const std::string& path, int exit_code, std::string_view why) {
  if (path.empty()) return;
  std::string text =
      absl::StrCat("exit code ", exit_code, ": ", absl::string_view(why.data(), why.size()), "\n");
  if (text.size() > kBytesMax) text.resize(kBytesMax);
  const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  const bool written =
      fd >= 0 && ::write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size());
  if (!written) spdlog::warn("the termination log cannot be written: {}", std::strerror(errno));
  if (fd >= 0) ::close(fd);
}

}  // namespace nibble
