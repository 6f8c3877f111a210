// A copy of an fp32 safetensors file with some tensors multiplied.
#pragma once

#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "tests/support/must.h"
#include "worker/weights/safetensors.h"
#include "worker/weights/safetensors_writer.h"

namespace nibble::gpu_check {

// `factors`: by the end of a tensor's name.
inline void WriteScaled(const std::string& from, const std::string& to,
                        const std::map<std::string, float>& factors) {
  const auto file = testing::Must(weights::SafetensorsFile::Open(from));
  std::vector<weights::TensorPlan> plan;
  for (const auto& [name, view] : file->tensors()) {
    CHECK(view.type == weights::TensorType::kF32);
    plan.push_back({.name = name, .type = view.type, .shape = view.shape});
  }
  const auto writer = testing::Must(weights::SafetensorsWriter::Create(to, plan, {}));
  for (const auto& [name, view] : file->tensors()) {
    std::vector<std::byte> data(view.data.begin(), view.data.end());
    for (const auto& [end, factor] : factors) {
      if (!name.ends_with(end)) continue;
      for (size_t at = 0; at < data.size(); at += sizeof(float)) {
        float value = 0;
        std::memcpy(&value, data.data() + at, sizeof(value));
        value *= factor;
        std::memcpy(data.data() + at, &value, sizeof(value));
      }
    }
    testing::Must(writer->Write(name, data));
  }
  testing::Must(writer->Finish());
}

}  // namespace nibble::gpu_check
