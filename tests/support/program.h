// One of the built programs as another process: started with flags, asked where it listens, ended.
// For tests and load tests.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace nibble::testing {

// Bounded wait on what another thread or process does.
[[nodiscard]] bool WaitFor(std::chrono::milliseconds limit, const std::function<bool()>& condition);

// Where the build puts its programs: NIBBLE_BINARY_DIR/bin.
[[nodiscard]] std::string BinaryPath(const std::string& name);

// One thread. Killed when this ends, where it still runs.
class Program {
 public:
  // Runs the program of the build with these flags, without NIBBLE_ variables in its environment.
  Program(const std::string& name, const std::vector<std::string>& flags);
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  // Waits for the file that the program was told to announce its addresses in (--announce is added
  // to the flags). False when it ended instead, or does not within the limit.
  [[nodiscard]] bool AwaitAddresses(std::chrono::seconds limit = std::chrono::seconds(60));
  // "grpc", "metrics" …; empty where the program did not say.
  [[nodiscard]] std::string Address(const std::string& name) const;

  [[nodiscard]] pid_t pid() const { return pid_; }
  void Signal(int signal) const;
  // Its exit code, or 128 + the signal that killed it; nullopt when it still runs at the limit.
  [[nodiscard]] std::optional<int> AwaitExit(std::chrono::milliseconds limit);
  // What it has printed on standard error.
  [[nodiscard]] std::string Errors() const;
  // The path of its announcement.
  [[nodiscard]] std::string announcement() const { return folder_ + "/where.json"; }

 private:
  std::string folder_;
  pid_t pid_ = -1;
  std::optional<int> exit_code_;
  std::map<std::string, std::string> addresses_;
};

}  // namespace nibble::testing
