// What names a file's bytes: SHA-256, and git's own name of a file (which a model hub gives for
// small ones).
#pragma once

#include <cstdint>
#include <memory>

#include "absl/strings/string_view.h"
#include "base/digest.h"

namespace nibble::fetch {

enum class DigestKind { kSha256, kGitBlob };

// "sha256", "git blob".
[[nodiscard]] const char* DigestWord(DigestKind kind);
[[nodiscard]] bool IsDigest(DigestKind kind, absl::string_view hex);

// For the bytes of a file of this size, which git's name begins with.
[[nodiscard]] std::unique_ptr<Digest> NewFileDigest(DigestKind kind, int64_t size);

}  // namespace nibble::fetch
