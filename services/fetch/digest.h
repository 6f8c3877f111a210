// What names a file's bytes: SHA-256, and git's own name of a file (which a model hub gives for
// small ones).
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/strings/string_view.h"

namespace nibble::fetch {

enum class DigestKind { kSha256, kGitBlob };

// "sha256", "git blob".
[[nodiscard]] const char* DigestWord(DigestKind kind);
[[nodiscard]] bool IsDigest(DigestKind kind, absl::string_view hex);

// One thread.
class Digest {
 public:
  // `size` is the whole file's, which git's name begins with; of no account for SHA-256.
  Digest(DigestKind kind, int64_t size);
  ~Digest();
  Digest(const Digest&) = delete;
  Digest& operator=(const Digest&) = delete;

  void Add(absl::string_view bytes);
  // Of everything that was added, as lower-case hex. Called once.
  [[nodiscard]] std::string Hex();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace nibble::fetch
