#include "services/fetch/download.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/owned_fd.h"
#include "base/status.h"
#include "base/units.h"
#include "services/fetch/digest.h"
#include "services/fetch/target_folder.h"

namespace nibble::fetch {
namespace {

constexpr size_t kListBytesMax = size_t{16} << 20;
constexpr size_t kReadBytes = size_t{1} << 20;
constexpr Duration kRetryWaitMax = std::chrono::seconds(30);

// Tries until it works, may not work, or has brought nothing new for `tries` times. `once` says
// whether it brought something.
absl::Status WithRetries(const FetchOptions& options,
                         const std::function<GetOutcome(bool* progress)>& once) {
  Duration wait = options.retry_wait;
  for (int failed = 0;;) {
    bool progress = false;
    const GetOutcome outcome = once(&progress);
    if (outcome.status.ok() || !outcome.again) return outcome.status;
    if (progress) {
      failed = 0;
      wait = options.retry_wait;
    }
    if (++failed >= options.tries) return outcome.status;
    const Duration pause = std::max(wait, outcome.after);
    options.say(absl::StrCat(outcome.status.message(), "; again in ", FormatDuration(pause)));
    options.sleep(pause);
    wait = std::min(2 * wait, std::max(kRetryWaitMax, options.retry_wait));
  }
}

std::string TokenFor(const FetchOptions& options) {
  return options.source.kind == Source::Kind::kHub ? options.token : "";
}

absl::StatusOr<std::string> GetText(const FetchOptions& options, HttpClient* client,
                                    const Url& url) {
  std::string text;
  const absl::Status status = WithRetries(options, [&](bool*) {
    text.clear();
    return client->Get(
        {.url = url, .bearer = TokenFor(options)}, [](const BodyHead&) { return absl::OkStatus(); },
        [&](absl::string_view bytes) {
          text.append(bytes.data(), bytes.size());
          if (text.size() <= kListBytesMax) return absl::OkStatus();
          return absl::DataLossError(
              absl::StrCat(url.Shown(), " is longer than 16 MiB: no list of files"));
        });
  });
  RETURN_IF_ERROR(status);
  return text;
}

// One file on its way: NAME.part, what it holds and its sums so far.
class PartialFile {
 public:
  PartialFile(int directory, const RemoteFile& file) : directory_(directory), file_(file) {}

  // Goes on with what an earlier fetch left.
  absl::Status Open();
  [[nodiscard]] int64_t size() const { return size_; }
  // Begins at `from`: where it ends, or at 0.
  absl::Status Begin(const BodyHead& head);
  absl::Status Add(absl::string_view bytes);
  absl::Status Restart() { return Begin({}); }
  // Whether it is what was announced; then it is there under its name and `sha256` is its sum.
  absl::StatusOr<bool> Finish(std::string* sha256);

 private:
  void NewSums(int64_t size);
  void AddToSums(absl::string_view bytes);
  absl::Status ReadThrough();
  absl::Status Error(absl::string_view what) const {
    const std::string text = absl::StrCat("cannot ", what, " ", file_.name);
    if (errno == ENOSPC || errno == EDQUOT) {
      return absl::ResourceExhaustedError(absl::StrCat(text, ": the file system is full"));
    }
    return absl::ErrnoToStatus(errno, text);
  }

  int directory_;
  const RemoteFile& file_;
  OwnedFd fd_;
  int64_t size_ = 0;
  int64_t whole_ = -1;  // bytes of the file as far as anybody said
  std::unique_ptr<Digest> sha256_;
  std::unique_ptr<Digest> announced_;  // nullptr: that is what was announced
};

void PartialFile::NewSums(int64_t size) {
  sha256_ = NewFileDigest(DigestKind::kSha256, size);
  if (file_.digest != DigestKind::kSha256) {
    announced_ = NewFileDigest(file_.digest, size);
  }
}

void PartialFile::AddToSums(absl::string_view bytes) {
  sha256_->Add(bytes.data(), bytes.size());
  if (announced_ != nullptr) announced_->Add(bytes.data(), bytes.size());
}

absl::Status PartialFile::ReadThrough() {
  std::vector<char> buffer(kReadBytes);
  for (;;) {
    const ssize_t count = read(fd_.get(), buffer.data(), buffer.size());
    if (count < 0) return Error("read");
    if (count == 0) return absl::OkStatus();
    AddToSums({buffer.data(), static_cast<size_t>(count)});
    size_ += count;
  }
}

absl::Status PartialFile::Open() {
  const std::string part = file_.name + ".part";
  // A file that was whole already goes through the same check as one that comes.
  if (faccessat(directory_, part.c_str(), F_OK, AT_SYMLINK_NOFOLLOW) != 0) {
    renameat(directory_, file_.name.c_str(), directory_, part.c_str());
  }
  fd_ = OwnedFd(openat(directory_, part.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644));
  if (!fd_.valid()) return Error("open");
  whole_ = file_.size;
  NewSums(file_.size);
  RETURN_IF_ERROR(ReadThrough());
  return file_.size >= 0 && size_ > file_.size ? Restart() : absl::OkStatus();
}

absl::Status PartialFile::Begin(const BodyHead& head) {
  const bool another = file_.size < 0 && head.from == 0;  // it may have changed since the last try
  if (whole_ < 0 || another) whole_ = head.total;
  if (head.total >= 0 && head.total != whole_) {
    return absl::DataLossError(
        absl::StrCat(file_.name, " has ", head.total, " bytes there; it was to have ", whole_));
  }
  if (head.from == size_) return absl::OkStatus();
  if (head.from != 0) {
    return absl::DataLossError(absl::StrCat(file_.url.Shown(), " went on at byte ", head.from,
                                            " where ", size_, " was asked for"));
  }
  if (ftruncate(fd_.get(), 0) != 0 || lseek(fd_.get(), 0, SEEK_SET) != 0) return Error("shorten");
  size_ = 0;
  NewSums(file_.size);
  return absl::OkStatus();
}

absl::Status PartialFile::Add(absl::string_view bytes) {
  AddToSums(bytes);
  size_ += static_cast<int64_t>(bytes.size());
  if (whole_ >= 0 && size_ > whole_) {
    return absl::DataLossError(absl::StrCat(file_.name, " is longer than its ", whole_, " bytes"));
  }
  while (!bytes.empty()) {
    const ssize_t count = write(fd_.get(), bytes.data(), bytes.size());
    if (count < 0) return Error("write");
    bytes.remove_prefix(static_cast<size_t>(count));
  }
  return absl::OkStatus();
}

absl::StatusOr<bool> PartialFile::Finish(std::string* sha256) {
  *sha256 = sha256_->FinishHex();
  const std::string hex = announced_ == nullptr ? *sha256 : announced_->FinishHex();
  if (hex != file_.hex) return false;
  if (fsync(fd_.get()) != 0) return Error("write");
  const std::string part = file_.name + ".part";
  if (renameat(directory_, part.c_str(), directory_, file_.name.c_str()) != 0) {
    return Error("rename");
  }
  return true;
}

class Fetch {
 public:
  explicit Fetch(const FetchOptions& options) : options_(options), client_(options.http) {}

  absl::Status Run();

 private:
  absl::StatusOr<Listing> List();
  // Room for what is missing, as far as sizes are known.
  absl::Status CheckRoom(const TargetFolder& folder, const Listing& listing) const;
  absl::Status FetchFile(int directory, const RemoteFile& file, size_t number, size_t count);
  // Its bytes, from wherever it is; whether they are the right ones is seen afterwards.
  absl::Status FetchBytes(const RemoteFile& file, size_t number, size_t count, PartialFile* part);

  const FetchOptions& options_;
  HttpClient client_;
  std::map<std::string, std::string> sums_;  // SHA-256 by name
};

absl::StatusOr<Listing> Fetch::List() {
  const Url url = ListingUrl(options_.source, options_.hub);
  ASSIGN_OR_RETURN(const std::string text, GetText(options_, &client_, url));
  return options_.source.kind == Source::Kind::kHub
             ? ReadHubListing(text, options_.source, options_.hub)
             : ReadSumsListing(text, options_.source);
}

absl::Status Fetch::CheckRoom(const TargetFolder& folder, const Listing& listing) const {
  int64_t need = 0;
  for (const RemoteFile& file : listing.files) {
    if (file.size > INT64_MAX - need) return absl::DataLossError("the list's sizes are no sizes");
    need += std::max<int64_t>(file.size, 0);
    struct stat about {};
    for (const std::string& name : {file.name, file.name + ".part"}) {
      if (fstatat(folder.descriptor(), name.c_str(), &about, AT_SYMLINK_NOFOLLOW) == 0) {
        need -= std::min<int64_t>(about.st_size, std::max<int64_t>(file.size, 0));
      }
    }
  }
  const int64_t free = folder.FreeBytes();
  if (need <= free) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat("the model needs ", FormatBytes(need),
                                                   " more; the folder's file system has ",
                                                   FormatBytes(free)));
}

absl::Status Fetch::FetchBytes(const RemoteFile& file, size_t number, size_t count,
                               PartialFile* part) {
  int64_t total = file.size;
  const auto show = [&] { options_.progress({file.name, number, count, part->size(), total}); };
  return WithRetries(options_, [&](bool* progress) -> GetOutcome {
    show();
    if (file.size >= 0 && part->size() == file.size) return {};
    const int64_t before = part->size();
    GetOutcome outcome = client_.Get(
        {.url = file.url, .bearer = TokenFor(options_), .from = before},
        [&](const BodyHead& head) {
          if (total < 0) total = head.total;
          return part->Begin(head);
        },
        [&](absl::string_view bytes) {
          RETURN_IF_ERROR(part->Add(bytes));
          show();
          return absl::OkStatus();
        });
    *progress = part->size() > before;
    // There is nothing behind what is there: it is whole, or not of this file.
    if (absl::IsOutOfRange(outcome.status) && before > 0) return {};
    if (outcome.status.ok() && file.size >= 0 && part->size() < file.size) {
      return {.status = absl::UnavailableError(absl::StrCat(file.url.Shown(), " broke off")),
              .again = true};
    }
    return outcome;
  });
}

absl::Status Fetch::FetchFile(int directory, const RemoteFile& file, size_t number, size_t count) {
  PartialFile part(directory, file);
  RETURN_IF_ERROR(part.Open());
  // Bytes of an earlier day, or of two halves, may not fit together: then once more from nothing.
  for (bool fresh = part.size() == 0;; fresh = true) {
    RETURN_IF_ERROR(FetchBytes(file, number, count, &part));
    ASSIGN_OR_RETURN(const bool right, part.Finish(&sums_[file.name]));
    if (right) return absl::OkStatus();
    RETURN_IF_ERROR(part.Restart());
    if (fresh) {
      return absl::DataLossError(absl::StrCat(file.name, " is not what was announced: its ",
                                              DigestWord(file.digest), " is not ", file.hex));
    }
    options_.say(
        absl::StrCat(file.name, " is not what was announced; once more from its beginning"));
  }
}

absl::Status Fetch::Run() {
  ASSIGN_OR_RETURN(const std::unique_ptr<TargetFolder> folder,
                   TargetFolder::Open(options_.folder, options_.source.text, [this] {
                     options_.say("another process fetches it; waiting");
                   }));
  if (folder == nullptr) {
    options_.say(absl::StrCat(options_.folder, " is there already"));
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(const Listing listing, List());
  for (const RemoteFile& file : listing.files) sums_.emplace(file.name, "");
  RETURN_IF_ERROR(folder->RemoveOthers(sums_));
  RETURN_IF_ERROR(CheckRoom(*folder, listing));
  size_t number = 0;
  for (const RemoteFile& file : listing.files) {
    RETURN_IF_ERROR(FetchFile(folder->descriptor(), file, ++number, listing.files.size()));
  }
  return folder->Finish(options_.source.text, listing.revision, sums_);
}

}  // namespace

absl::Status FetchModel(const FetchOptions& options) { return Fetch(options).Run(); }

}  // namespace nibble::fetch
