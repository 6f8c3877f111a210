#include "worker/group/orphans.h"

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"

namespace nibble::group {
namespace {

constexpr char kProgram[] = "nibble-worker";

std::string ReadAll(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

bool IsWorker(const std::string& command_line) {
  const std::string program = command_line.c_str();  // up to the first zero byte
  return std::filesystem::path(program).filename() == kProgram;
}

// The parent in /proc/PID/stat, which may have anything in its second field, the name; 0 where the
// process is gone or about to be.
pid_t ParentOf(const std::filesystem::path& process) {
  const std::string text = ReadAll(process / "stat");
  const size_t name_end = text.rfind(')');
  if (name_end == std::string::npos) return 0;
  std::istringstream rest(text.substr(name_end + 1));
  std::string state;
  pid_t parent = 0;
  rest >> state >> parent;
  return state == "Z" || state == "X" ? 0 : parent;
}

int64_t ResidentBytes(const std::filesystem::path& process) {
  std::istringstream pages(ReadAll(process / "statm"));
  int64_t total = 0;
  int64_t resident = 0;
  pages >> total >> resident;
  return resident * ::sysconf(_SC_PAGESIZE);
}

}  // namespace

std::vector<Orphan> FindOrphans(const std::string& proc) {
  std::vector<Orphan> orphans;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(proc, error)) {
    pid_t pid = 0;
    if (!absl::SimpleAtoi(entry.path().filename().string(), &pid)) continue;
    const std::string line = ReadAll(entry.path() / "cmdline");
    const std::string arguments = line.substr(std::min(line.find('\0'), line.size()));
    if (!IsWorker(line) || !absl::StrContains(arguments, "--rank=")) continue;
    const pid_t parent = ParentOf(entry.path());
    if (parent == 0) continue;
    const auto above = std::filesystem::path(proc) / std::to_string(parent);
    if (IsWorker(ReadAll(above / "cmdline"))) continue;
    orphans.push_back({.pid = pid, .resident_bytes = ResidentBytes(entry.path())});
  }
  return orphans;
}

}  // namespace nibble::group
