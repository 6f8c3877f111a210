#include "worker/group/rank_process.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace nibble::group {
namespace {

absl::Status Failed(const char* action, int error) {
  return absl::InternalError(absl::StrCat(action, " failed: ", std::strerror(error)));
}

// Settings for posix_spawn, freed with this.
class SpawnSettings {
 public:
  SpawnSettings() {
    CHECK(::posix_spawn_file_actions_init(&actions_) == 0);
    CHECK(::posix_spawnattr_init(&attributes_) == 0);
    sigset_t blocked;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGTERM);
    sigaddset(&blocked, SIGINT);
    CHECK(::posix_spawnattr_setsigmask(&attributes_, &blocked) == 0);
    CHECK(::posix_spawnattr_setflags(&attributes_, POSIX_SPAWN_SETSIGMASK) == 0);
  }
  ~SpawnSettings() {
    ::posix_spawn_file_actions_destroy(&actions_);
    ::posix_spawnattr_destroy(&attributes_);
  }
  SpawnSettings(const SpawnSettings&) = delete;
  SpawnSettings& operator=(const SpawnSettings&) = delete;

  // A descriptor duplicated onto itself loses its close-on-exec mark in the child alone.
  void Inherit(int fd) { CHECK(::posix_spawn_file_actions_adddup2(&actions_, fd, fd) == 0); }

  [[nodiscard]] const posix_spawn_file_actions_t* actions() const { return &actions_; }
  [[nodiscard]] const posix_spawnattr_t* attributes() const { return &attributes_; }

 private:
  posix_spawn_file_actions_t actions_{};
  posix_spawnattr_t attributes_{};
};

}  // namespace

absl::StatusOr<Pipe> MakePipe() {
  int ends[2] = {-1, -1};
  if (::pipe2(ends, O_CLOEXEC) != 0) return Failed("pipe2", errno);
  return Pipe{.read = OwnedFd(ends[0]), .write = OwnedFd(ends[1])};
}

absl::StatusOr<RankProcess> RankProcess::Start(const std::string& executable,
                                               const std::vector<std::string>& arguments,
                                               const std::vector<int>& inherited) {
  SpawnSettings settings;
  for (const int fd : inherited) settings.Inherit(fd);
  std::vector<std::string> words = {executable};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);

  pid_t pid = -1;
  const int error = ::posix_spawn(&pid, executable.c_str(), settings.actions(),
                                  settings.attributes(), argv.data(), environ);
  if (error != 0) return Failed("starting a rank", error);
  // glibc 2.36 declares pidfd_open() without C linkage.
  OwnedFd pidfd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
  if (!pidfd.valid()) {
    const absl::Status status = Failed("pidfd_open", errno);
    ::kill(pid, SIGKILL);  // not reaped yet: the number is still its own
    ::waitpid(pid, nullptr, 0);
    return status;
  }
  return RankProcess(pid, std::move(pidfd));
}

RankProcess::RankProcess(RankProcess&& other) noexcept
    : pid_(std::exchange(other.pid_, -1)),
      pidfd_(std::move(other.pidfd_)),
      exit_(other.exit_),
      abandoned_(other.abandoned_) {}

RankProcess::~RankProcess() {
  if (pid_ < 0 || exit_.has_value()) return;
  Signal(SIGKILL);
  if (abandoned_) return;
  siginfo_t info{};
  while (::waitid(P_PIDFD, static_cast<id_t>(pidfd_.get()), &info, WEXITED) != 0 &&
         errno == EINTR) {
  }
}

std::optional<ProcessExit> RankProcess::Exited() {
  if (exit_.has_value()) return exit_;
  siginfo_t info{};
  const int result = ::waitid(P_PIDFD, static_cast<id_t>(pidfd_.get()), &info, WEXITED | WNOHANG);
  if (result != 0 || info.si_pid == 0) return std::nullopt;
  const bool exited = info.si_code == CLD_EXITED;
  exit_ = ProcessExit{.code = exited ? info.si_status : 0, .signal = exited ? 0 : info.si_status};
  return exit_;
}

void RankProcess::Signal(int signal) const {
  if (!exit_.has_value()) ::syscall(SYS_pidfd_send_signal, pidfd_.get(), signal, nullptr, 0);
}

}  // namespace nibble::group
