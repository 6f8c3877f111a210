#include "tests/support/program.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <thread>

#include "base/check.h"

namespace nibble::testing {
namespace {

std::string ReadAll(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

bool WaitFor(std::chrono::milliseconds limit, const std::function<bool()>& condition) {
  const auto until = std::chrono::steady_clock::now() + limit;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > until) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return true;
}

std::string BinaryPath(const std::string& name) {
  const char* folder = std::getenv("NIBBLE_BINARY_DIR");
  return std::string(folder != nullptr ? folder : "build/release") + "/bin/" + name;
}

Program::Program(const std::string& name, const std::vector<std::string>& flags)
    : folder_(std::filesystem::temp_directory_path() / "nibble-program-XXXXXX") {
  CHECK(::mkdtemp(folder_.data()) != nullptr);
  std::vector<std::string> words = {BinaryPath(name), "--announce=" + announcement()};
  words.insert(words.end(), flags.begin(), flags.end());
  std::vector<char*> argv;
  argv.reserve(words.size() + 1);
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  std::vector<char*> environment;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    if (std::strncmp(*entry, "NIBBLE_", 7) != 0) environment.push_back(*entry);
  }
  environment.push_back(nullptr);

  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, (folder_ + "/errors").c_str(),
                                     O_WRONLY | O_CREAT | O_TRUNC, 0600);
  ::posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
  CHECK_MSG(::posix_spawn(&pid_, argv[0], &actions, nullptr, argv.data(), environment.data()) == 0,
            words[0]);
  ::posix_spawn_file_actions_destroy(&actions);
}

Program::~Program() {
  Signal(SIGKILL);
  if (!exit_code_.has_value()) ::waitpid(pid_, nullptr, 0);
  std::error_code ignored;
  std::filesystem::remove_all(folder_, ignored);
}

bool Program::AwaitAddresses(std::chrono::seconds limit) {
  const bool announced = WaitFor(limit, [this] {
    return std::filesystem::exists(announcement()) ||
           AwaitExit(std::chrono::milliseconds(0)).has_value();
  });
  if (!announced || exit_code_.has_value()) return false;
  addresses_ = nlohmann::json::parse(ReadAll(announcement()));
  return true;
}

std::string Program::Address(const std::string& name) const {
  const auto found = addresses_.find(name);
  return found == addresses_.end() ? "" : found->second;
}

void Program::Signal(int signal) const {
  if (!exit_code_.has_value()) ::kill(pid_, signal);
}

std::optional<int> Program::AwaitExit(std::chrono::milliseconds limit) {
  if (exit_code_.has_value()) return exit_code_;
  int status = 0;
  if (!WaitFor(limit, [&] { return ::waitpid(pid_, &status, WNOHANG) == pid_; })) {
    return std::nullopt;
  }
  exit_code_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return exit_code_;
}

std::string Program::Errors() const { return ReadAll(folder_ + "/errors"); }

}  // namespace nibble::testing
