#include "worker/scheduling/prefix_names.h"

#include <openssl/evp.h>

#include <cstddef>

#include "base/check.h"

namespace nibble::scheduling {

// One context for all names: only the first use of it allocates.
struct PrefixNamer::Digest {
  EVP_MD_CTX* const context = EVP_MD_CTX_new();

  Digest() { CHECK(context != nullptr && EVP_DigestInit_ex(context, EVP_sha256(), nullptr) == 1); }
  ~Digest() { EVP_MD_CTX_free(context); }
  Digest(const Digest&) = delete;
  Digest& operator=(const Digest&) = delete;

  void Add(const void* bytes, size_t size) { CHECK(EVP_DigestUpdate(context, bytes, size) == 1); }
  // The length goes first, so that no two lists of parts are the same bytes.
  void AddPart(std::string_view part) {
    const uint64_t size = part.size();
    Add(&size, sizeof(size));
    Add(part.data(), part.size());
  }
  BlockName Finish() {
    BlockName name;
    CHECK(EVP_DigestFinal_ex(context, name.data(), nullptr) == 1);
    CHECK(EVP_DigestInit_ex(context, nullptr, nullptr) == 1);
    return name;
  }
};

PrefixNamer::PrefixNamer(std::string_view key, std::string_view model)
    : digest_(std::make_unique<Digest>()) {
  digest_->AddPart(key);
  digest_->AddPart(model);
  identity_ = digest_->Finish();
}

PrefixNamer::~PrefixNamer() = default;

BlockName PrefixNamer::Root(std::string_view salt) {
  digest_->Add(identity_.data(), identity_.size());
  digest_->AddPart(salt);
  return digest_->Finish();
}

BlockName PrefixNamer::Next(const BlockName& before, BlockTokens tokens) {
  digest_->Add(before.data(), before.size());
  digest_->Add(tokens.data(), tokens.size_bytes());
  return digest_->Finish();
}

}  // namespace nibble::scheduling
