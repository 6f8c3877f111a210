#include "services/fetch/digest.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"

namespace nibble::fetch {
namespace {

constexpr size_t kSha256Hex = 64;
constexpr size_t kSha1Hex = 40;

}  // namespace

const char* DigestWord(DigestKind kind) {
  return kind == DigestKind::kSha256 ? "sha256" : "git blob";
}

bool IsDigest(DigestKind kind, absl::string_view hex) {
  return hex.size() == (kind == DigestKind::kSha256 ? kSha256Hex : kSha1Hex) &&
         std::all_of(hex.begin(), hex.end(),
                     [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
}

std::unique_ptr<Digest> NewFileDigest(DigestKind kind, int64_t size) {
  if (kind == DigestKind::kSha256) return std::make_unique<Digest>();
  auto digest = std::make_unique<Digest>(HashKind::kSha1);
  const std::string head = absl::StrCat("blob ", size);
  digest->Add(head.c_str(), head.size() + 1);  // with the zero at its end
  return digest;
}

}  // namespace nibble::fetch
