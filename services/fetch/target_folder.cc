#include "services/fetch/target_folder.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <system_error>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/status.h"

namespace nibble::fetch {
namespace {

constexpr char kOriginFile[] = ".fetched-from";
constexpr char kSumsFile[] = "SHA256SUMS";

absl::Status SystemError(absl::string_view what, const std::string& path) {
  return absl::ErrnoToStatus(errno, absl::StrCat(what, " ", path));
}

// What there is under the folder's name: nothing (or an empty folder), the same model, or
// something else.
enum class Present { kNothing, kSame, kOther };

absl::StatusOr<Present> Look(const std::string& folder, const std::string& source) {
  struct stat about {};
  if (stat(folder.c_str(), &about) != 0) {
    if (errno == ENOENT) return Present::kNothing;
    return SystemError("cannot look at", folder);
  }
  if (!S_ISDIR(about.st_mode)) return Present::kOther;
  std::string line;
  std::ifstream origin(absl::StrCat(folder, "/", kOriginFile));
  if (std::getline(origin, line)) return line == source ? Present::kSame : Present::kOther;
  std::error_code error;
  if (!std::filesystem::is_empty(folder, error) || error) return Present::kOther;
  struct stat parent {};
  if (stat(absl::StrCat(folder, "/..").c_str(), &parent) == 0 && parent.st_dev != about.st_dev) {
    return absl::InvalidArgumentError(
        absl::StrCat(folder, " is where a volume is mounted; name a folder inside of it"));
  }
  return Present::kNothing;
}

absl::Status WriteFile(int directory, const char* name, const std::string& text) {
  const OwnedFd fd(
      openat(directory, name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0644));
  if (!fd.valid()) return SystemError("cannot write", name);
  if (write(fd.get(), text.data(), text.size()) != static_cast<ssize_t>(text.size()) ||
      fsync(fd.get()) != 0) {
    return SystemError("cannot write", name);
  }
  return absl::OkStatus();
}

// The partial folder with its lock; invalid where another process renamed it meanwhile.
absl::StatusOr<OwnedFd> Lock(const std::string& partial, const std::function<void()>& waits) {
  if (mkdir(partial.c_str(), 0755) != 0 && errno != EEXIST) {
    return SystemError("cannot make", partial);
  }
  OwnedFd directory(open(partial.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (!directory.valid()) {
    if (errno == ENOENT) return OwnedFd();
    return SystemError("cannot open", partial);
  }
  if (flock(directory.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) return SystemError("cannot lock", partial);
    waits();
    if (flock(directory.get(), LOCK_EX) != 0) return SystemError("cannot lock", partial);
  }
  struct stat opened {};
  struct stat named {};
  const bool same = fstat(directory.get(), &opened) == 0 && stat(partial.c_str(), &named) == 0 &&
                    opened.st_ino == named.st_ino && opened.st_dev == named.st_dev;
  if (!same) return OwnedFd();
  return directory;
}

}  // namespace

absl::StatusOr<std::unique_ptr<TargetFolder>> TargetFolder::Open(
    std::string folder, const std::string& source, const std::function<void()>& waits) {
  while (absl::EndsWith(folder, "/")) folder.pop_back();
  if (folder.empty()) return absl::InvalidArgumentError("the folder is /; name one inside of it");
  const std::filesystem::path parent = std::filesystem::path(folder).parent_path();
  std::error_code error;
  if (!parent.empty()) std::filesystem::create_directories(parent, error);
  for (;;) {
    ASSIGN_OR_RETURN(const Present present, Look(folder, source));
    if (present == Present::kSame) return nullptr;
    if (present == Present::kOther) {
      return absl::AlreadyExistsError(
          absl::StrCat(folder, " is there and was not fetched from ", source));
    }
    const std::string partial = folder + ".partial";
    ASSIGN_OR_RETURN(OwnedFd directory, Lock(partial, waits));
    if (!directory.valid()) continue;
    // Another process may have finished between the look and the lock; now none can.
    ASSIGN_OR_RETURN(const Present locked, Look(folder, source));
    if (locked == Present::kNothing) {
      return std::unique_ptr<TargetFolder>(
          new TargetFolder(std::move(folder), std::move(directory)));
    }
    rmdir(partial.c_str());
  }
}

int64_t TargetFolder::FreeBytes() const {
  struct statvfs about {};
  if (fstatvfs(directory_.get(), &about) != 0) return INT64_MAX;
  return static_cast<int64_t>(about.f_bavail * about.f_frsize);
}

absl::Status TargetFolder::RemoveOthers(const std::map<std::string, std::string>& names) const {
  DIR* listed = fdopendir(dup(directory_.get()));
  if (listed == nullptr) return SystemError("cannot list", folder_ + ".partial");
  rewinddir(listed);
  absl::Status status;
  while (const dirent* entry = readdir(listed)) {
    const absl::string_view name = entry->d_name;
    if (name == "." || name == "..") continue;
    if (names.contains(std::string(absl::StripSuffix(name, ".part")))) continue;
    if (unlinkat(directory_.get(), entry->d_name, 0) != 0) {
      status = SystemError("cannot remove", absl::StrCat(folder_, ".partial/", name));
    }
  }
  closedir(listed);
  return status;
}

absl::Status TargetFolder::Finish(const std::string& source, const std::string& revision,
                                  const std::map<std::string, std::string>& sums) {
  std::string text;
  for (const auto& [name, sum] : sums) absl::StrAppend(&text, sum, "  ", name, "\n");
  RETURN_IF_ERROR(WriteFile(directory_.get(), kSumsFile, text));
  RETURN_IF_ERROR(
      WriteFile(directory_.get(), kOriginFile, absl::StrCat(source, "\n", revision, "\n")));
  if (fsync(directory_.get()) != 0) return SystemError("cannot write", folder_);
  if (std::rename((folder_ + ".partial").c_str(), folder_.c_str()) != 0) {
    return SystemError("cannot rename the finished folder to", folder_);
  }
  return absl::OkStatus();
}

}  // namespace nibble::fetch
