// Names of KV blocks by what they hold: a block's name follows from all tokens up to its end, from
// the model and from whose prefix it is.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string_view>

#include "base/digest.h"
#include "worker/step/step_plan.h"

namespace nibble::scheduling {

using BlockName = std::array<uint8_t, 32>;
using BlockTokens = std::span<const int32_t, step::kBlockTokens>;

// SHA-256, chained: a name is the hash of the name before it and of the block's token ids; the
// first one follows the hash of key, model and salt. Who does not know the key cannot tell which
// prompts have names that collide in the index. One thread.
class PrefixNamer {
 public:
  PrefixNamer(std::string_view key, std::string_view model);

  // What the first block of every prefix with this salt follows.
  [[nodiscard]] BlockName Root(std::string_view salt);
  // Allocates no memory.
  [[nodiscard]] BlockName Next(const BlockName& before, BlockTokens tokens);

 private:
  void AddPart(std::string_view part);

  Digest digest_;         // one for all names: only its making allocates
  BlockName identity_{};  // of key and model
};

}  // namespace nibble::scheduling
