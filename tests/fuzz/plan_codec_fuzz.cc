// Bytes as a plan, and as masks: never a crash, and what is accepted is the one wire form of what
// it says.
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "worker/step/plan_codec.h"

namespace {

template <typename Message>
void TryOne(std::span<const std::byte> bytes) {
  Message message;
  if (!nibble::step::Decode(bytes, &message).ok()) return;
  std::vector<std::byte> again(nibble::step::EncodedSize(message));
  CHECK(again.size() == bytes.size());
  CHECK(nibble::step::Encode(message, again).ok());
  CHECK(std::memcmp(again.data(), bytes.data(), bytes.size()) == 0);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto bytes = std::as_bytes(std::span(data, size));
  TryOne<nibble::step::StepPlan>(bytes);
  TryOne<nibble::step::MaskBatch>(bytes);
  return 0;
}
