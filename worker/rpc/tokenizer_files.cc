#include "worker/rpc/tokenizer_files.h"

#include <openssl/evp.h>

#include <array>
#include <cstdint>
#include <memory>
#include <string_view>

#include "absl/strings/escaping.h"
#include "base/check.h"

namespace nibble::rpc {
namespace {

std::string HashOf(const TokenizerFiles::Files& files) {
  const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> digest(EVP_MD_CTX_new(),
                                                                       &EVP_MD_CTX_free);
  CHECK(digest != nullptr);
  CHECK(EVP_DigestInit_ex(digest.get(), EVP_sha256(), nullptr) == 1);
  const auto add = [&digest](std::string_view bytes) {
    CHECK(EVP_DigestUpdate(digest.get(), bytes.data(), bytes.size()) == 1);
  };
  for (const auto& [name, contents] : files) {
    std::array<char, 9> end_of_name_and_size{};
    for (size_t i = 0; i < 8; ++i) {
      end_of_name_and_size[i + 1] = static_cast<char>((uint64_t{contents.size()} >> (8 * i)) & 255);
    }
    add(name);
    add({end_of_name_and_size.data(), end_of_name_and_size.size()});
    add(contents);
  }
  std::array<unsigned char, EVP_MAX_MD_SIZE> hash{};
  unsigned int size = 0;
  CHECK(EVP_DigestFinal_ex(digest.get(), hash.data(), &size) == 1);
  return absl::BytesToHexString(
      absl::string_view(reinterpret_cast<const char*>(hash.data()), size));
}

}  // namespace

TokenizerFiles::TokenizerFiles(Files files) : files_(std::move(files)), hash_(HashOf(files_)) {}

}  // namespace nibble::rpc
