#include "services/cli/child_process.h"

#include <signal.h>

#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace nibble::cli {
namespace {

constexpr int kExitNotStarted = 127;

// Between fork and exec: async-signal-safe calls only.
[[noreturn]] void BecomeChild(pid_t parent, char* const* argv, char* const* environment) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(kExitNotStarted);  // it went before the call above
  setpgid(0, 0);
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  execve(argv[0], argv, environment);
  _exit(kExitNotStarted);
}

std::vector<char*> EnvironmentWithoutOurs() {
  std::vector<char*> kept;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    if (!std::string_view(*entry).starts_with("NIBBLE_")) kept.push_back(*entry);
  }
  kept.push_back(nullptr);
  return kept;
}

}  // namespace

std::string ChildExit::Describe() const {
  if (signal == 0) return absl::StrCat("exit code ", code);
  return absl::StrCat("signal ", signal, " (", strsignal(signal), ")");
}

absl::StatusOr<std::unique_ptr<ChildProcess>> ChildProcess::Start(
    const std::vector<std::string>& argv) {
  CHECK(!argv.empty());
  if (access(argv[0].c_str(), X_OK) != 0) {
    return absl::InternalError(absl::StrCat(argv[0], ": ", std::strerror(errno)));
  }
  std::vector<char*> words;
  words.reserve(argv.size() + 1);
  for (const std::string& word : argv) words.push_back(const_cast<char*>(word.c_str()));
  words.push_back(nullptr);
  const std::vector<char*> environment = EnvironmentWithoutOurs();

  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid < 0) return absl::InternalError(absl::StrCat("fork: ", std::strerror(errno)));
  if (pid == 0) BecomeChild(parent, words.data(), environment.data());
  setpgid(pid, pid);  // here too: whoever runs first makes the group that the destructor kills
  // Not pidfd_open(): glibc 2.36 declares it without C linkage.
  const int pidfd = static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
  CHECK_MSG(pidfd >= 0, "pidfd_open of our own child");
  return std::unique_ptr<ChildProcess>(new ChildProcess(pid, pidfd));
}

ChildProcess::~ChildProcess() {
  if (!Poll()) {
    kill(-pid_, SIGKILL);  // with all that it started
    siginfo_t info{};
    while (waitid(P_PID, static_cast<id_t>(pid_), &info, WEXITED) != 0 && errno == EINTR) {
    }
  }
  close(pidfd_);
}

const std::optional<ChildExit>& ChildProcess::Poll() {
  siginfo_t info{};
  if (!exit_ && waitid(P_PID, static_cast<id_t>(pid_), &info, WEXITED | WNOHANG) == 0 &&
      info.si_pid != 0) {
    exit_ = info.si_code == CLD_EXITED ? ChildExit{.code = info.si_status}
                                       : ChildExit{.signal = info.si_status};
  }
  return exit_;
}

void ChildProcess::Signal(int signal) {
  if (!Poll()) kill(pid_, signal);
}

}  // namespace nibble::cli
