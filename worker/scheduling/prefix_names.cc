#include "worker/scheduling/prefix_names.h"

namespace nibble::scheduling {

// The length goes first, so that no two lists of parts are the same bytes.
void PrefixNamer::AddPart(std::string_view part) {
  const uint64_t size = part.size();
  digest_.Add(&size, sizeof(size));
  digest_.Add(part);
}

PrefixNamer::PrefixNamer(std::string_view key, std::string_view model) {
  AddPart(key);
  AddPart(model);
  identity_ = digest_.Finish();
}

BlockName PrefixNamer::Root(std::string_view salt) {
  digest_.Add(identity_.data(), identity_.size());
  AddPart(salt);
  return digest_.Finish();
}

BlockName PrefixNamer::Next(const BlockName& before, BlockTokens tokens) {
  digest_.Add(before.data(), before.size());
  digest_.Add(tokens.data(), tokens.size_bytes());
  return digest_.Finish();
}

}  // namespace nibble::scheduling
