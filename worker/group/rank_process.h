// One rank's process, seen from the supervisor.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "base/owned_fd.h"

namespace nibble::group {

// A pipe whose ends are both close-on-exec.
struct Pipe {
  OwnedFd read;
  OwnedFd write;
};
[[nodiscard]] absl::StatusOr<Pipe> MakePipe();

// How a process ended.
struct ProcessExit {
  int code = 0;    // of exit(); meaningless where signal != 0
  int signal = 0;  // that killed it
};

// Killed and reaped with its owner, if it still runs. One thread; that thread must live as long as
// the process, which asks the kernel to be killed when it ends.
class RankProcess {
 public:
  // Starts `executable` with `arguments` (without argv[0]). It gets standard input, output and
  // error and `inherited`, under the same numbers, and no other descriptor. SIGTERM and SIGINT are
  // blocked in it: what comes to a whole process group is the supervisor's to handle.
  [[nodiscard]] static absl::StatusOr<RankProcess> Start(const std::string& executable,
                                                         const std::vector<std::string>& arguments,
                                                         const std::vector<int>& inherited);
  RankProcess(RankProcess&& other) noexcept;
  RankProcess& operator=(RankProcess&&) = delete;
  ~RankProcess();

  [[nodiscard]] pid_t pid() const { return pid_; }
  // Readable once the process has ended.
  [[nodiscard]] int pidfd() const { return pidfd_.get(); }
  // Reaps it if it has ended. The same answer from then on.
  [[nodiscard]] std::optional<ProcessExit> Exited();
  // By descriptor: never another process that got the same number.
  void Signal(int signal) const;
  // Waits for it no more, not even in the destructor. For a process that cannot be killed.
  void Abandon() { abandoned_ = true; }

 private:
  RankProcess(pid_t pid, OwnedFd pidfd) : pid_(pid), pidfd_(std::move(pidfd)) {}

  pid_t pid_;
  OwnedFd pidfd_;
  std::optional<ProcessExit> exit_;
  bool abandoned_ = false;
};

}  // namespace nibble::group
