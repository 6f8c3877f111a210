// One child process that does not outlive this one.
#pragma once

#include <sys/types.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace nibble::cli {

// How a process ended.
struct ChildExit {
  int code = 0;    // where it exited
  int signal = 0;  // where a signal ended it; else 0
  [[nodiscard]] bool ok() const { return code == 0 && signal == 0; }
  // "exit code 5", "signal 9 (Killed)".
  [[nodiscard]] std::string Describe() const;
};

// Used by the thread that started it: the kernel ends the child when that thread goes.
class ChildProcess {
 public:
  // Runs argv[0] with the rest as arguments, in a process group of its own (a Ctrl-C of the
  // terminal reaches this program alone), with no signal blocked and without NIBBLE_ variables in
  // its environment: what it needs stands in its arguments. INTERNAL when there is no process.
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<ChildProcess>> Start(
      const std::vector<std::string>& argv);
  // Kills what still runs, with all that it started, and reaps it.
  ~ChildProcess();
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  // Becomes readable when the process has ended.
  [[nodiscard]] int pidfd() const { return pidfd_; }
  [[nodiscard]] pid_t pid() const { return pid_; }
  // Reaps it where it has ended; the same answer ever after.
  [[nodiscard]] const std::optional<ChildExit>& Poll();
  // No effect once it has ended.
  void Signal(int signal);

 private:
  ChildProcess(pid_t pid, int pidfd) : pid_(pid), pidfd_(pidfd) {}

  pid_t pid_;
  int pidfd_;
  std::optional<ChildExit> exit_;
};

}  // namespace nibble::cli
