#include "services/fetch/digest.h"

#include <openssl/evp.h>

#include <algorithm>
#include <array>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace nibble::fetch {
namespace {

constexpr size_t kSha256Hex = 64;
constexpr size_t kSha1Hex = 40;

}  // namespace

struct Digest::State {
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context{EVP_MD_CTX_new(),
                                                                  &EVP_MD_CTX_free};
};

const char* DigestWord(DigestKind kind) {
  return kind == DigestKind::kSha256 ? "sha256" : "git blob";
}

bool IsDigest(DigestKind kind, absl::string_view hex) {
  return hex.size() == (kind == DigestKind::kSha256 ? kSha256Hex : kSha1Hex) &&
         std::all_of(hex.begin(), hex.end(),
                     [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
}

Digest::Digest(DigestKind kind, int64_t size) : state_(std::make_unique<State>()) {
  const EVP_MD* method = kind == DigestKind::kSha256 ? EVP_sha256() : EVP_sha1();
  CHECK(EVP_DigestInit_ex(state_->context.get(), method, nullptr) == 1);
  if (kind == DigestKind::kGitBlob) {
    const std::string head = absl::StrCat("blob ", size);
    Add(absl::string_view(head.c_str(), head.size() + 1));
  }
}

Digest::~Digest() = default;

void Digest::Add(absl::string_view bytes) {
  CHECK(EVP_DigestUpdate(state_->context.get(), bytes.data(), bytes.size()) == 1);
}

std::string Digest::Hex() {
  std::array<unsigned char, EVP_MAX_MD_SIZE> hash{};
  unsigned size = 0;
  CHECK(EVP_DigestFinal_ex(state_->context.get(), hash.data(), &size) == 1);
  return absl::BytesToHexString({reinterpret_cast<const char*>(hash.data()), size});
}

}  // namespace nibble::fetch
