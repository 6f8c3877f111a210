// The JSON part of a safetensors file, one token at a time.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/weights/safetensors.h"

namespace nibble::weights {

// As the header states it; nothing is compared with the data yet but type, shape and length.
struct HeaderEntry {
  std::string name;
  TensorType type = TensorType::kF32;
  std::vector<int64_t> shape;
  uint64_t begin = 0;  // bytes from the start of the data
  uint64_t end = 0;
};

struct SafetensorsHeader {
  std::vector<HeaderEntry> entries;  // by rising begin, then end; names are unique
  std::map<std::string, std::string> metadata;
};

// DATA_LOSS names the tensor; UNIMPLEMENTED a type that exists and is not read.
[[nodiscard]] absl::StatusOr<SafetensorsHeader> ParseHeader(std::string_view json);

}  // namespace nibble::weights
