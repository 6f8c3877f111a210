// What a gateway needs to turn text into tokens and back, as the leader hands it out.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace nibble::rpc {

// Immutable after construction, so any thread may read it.
class TokenizerFiles {
 public:
  // (name, contents), in the order in which they are sent; files that a model does not have are
  // left out.
  using Files = std::vector<std::pair<std::string, std::string>>;

  explicit TokenizerFiles(Files files);

  [[nodiscard]] const Files& files() const { return files_; }

  // SHA-256 in hexadecimal digits over, file by file: name, one zero byte, the size as eight bytes
  // (least significant first), contents. A receiver can compute it again.
  [[nodiscard]] const std::string& hash() const { return hash_; }

 private:
  Files files_;
  std::string hash_;
};

}  // namespace nibble::rpc
