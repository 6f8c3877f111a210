#include "base/digest.h"

#include <openssl/evp.h>

#include "absl/strings/escaping.h"
#include "base/check.h"

namespace nibble {
namespace {

const EVP_MD* MethodOf(HashKind kind) {
  return kind == HashKind::kSha256 ? EVP_sha256() : EVP_sha1();
}

}  // namespace

void Digest::Free::operator()(evp_md_ctx_st* context) const { EVP_MD_CTX_free(context); }

Digest::Digest(HashKind kind)
    : context_(EVP_MD_CTX_new()), size_(static_cast<size_t>(EVP_MD_get_size(MethodOf(kind)))) {
  CHECK(context_ != nullptr && size_ <= Hash().size());
  CHECK(EVP_DigestInit_ex(context_.get(), MethodOf(kind), nullptr) == 1);
}

void Digest::Add(const void* bytes, size_t size) {
  CHECK(EVP_DigestUpdate(context_.get(), bytes, size) == 1);
}

Digest::Hash Digest::Finish() {
  Hash hash{};
  CHECK(EVP_DigestFinal_ex(context_.get(), hash.data(), nullptr) == 1);
  CHECK(EVP_DigestInit_ex(context_.get(), nullptr, nullptr) == 1);
  return hash;
}

std::string Digest::FinishHex() {
  const Hash hash = Finish();
  return absl::BytesToHexString({reinterpret_cast<const char*>(hash.data()), size_});
}

}  // namespace nibble
