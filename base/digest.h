// A hash by OpenSSL over bytes that come in parts.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

struct evp_md_ctx_st;  // OpenSSL's EVP_MD_CTX

namespace nibble {

enum class HashKind : uint8_t { kSha256, kSha1 };

// One thread.
class Digest {
 public:
  using Hash = std::array<uint8_t, 32>;

  explicit Digest(HashKind kind = HashKind::kSha256);

  void Add(const void* bytes, size_t size);
  void Add(std::string_view bytes) { Add(bytes.data(), bytes.size()); }

  // Of everything that was added since the last one; begins anew. SHA-1 leaves the last twelve
  // bytes zero. Allocates nothing.
  [[nodiscard]] Hash Finish();
  // The same as lower-case hex, of the hash's own length.
  [[nodiscard]] std::string FinishHex();

 private:
  struct Free {
    void operator()(evp_md_ctx_st* context) const;
  };

  std::unique_ptr<evp_md_ctx_st, Free> context_;
  const size_t size_;
};

}  // namespace nibble
