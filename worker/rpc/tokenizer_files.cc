#include "worker/rpc/tokenizer_files.h"

#include <array>
#include <cstdint>

#include "base/digest.h"

namespace nibble::rpc {
namespace {

std::string HashOf(const TokenizerFiles::Files& files) {
  Digest digest;
  for (const auto& [name, contents] : files) {
    std::array<char, 9> end_of_name_and_size{};
    for (size_t i = 0; i < 8; ++i) {
      end_of_name_and_size[i + 1] = static_cast<char>((uint64_t{contents.size()} >> (8 * i)) & 255);
    }
    digest.Add(name);
    digest.Add(end_of_name_and_size.data(), end_of_name_and_size.size());
    digest.Add(contents);
  }
  return digest.FinishHex();
}

}  // namespace

TokenizerFiles::TokenizerFiles(Files files) : files_(std::move(files)), hash_(HashOf(files_)) {}

}  // namespace nibble::rpc
