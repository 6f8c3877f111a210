// The AWQ checkpoint of SmolLM2-135M and the reference outputs beside it (its README says how
// they were computed).
#pragma once

#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/check.h"
#include "nlohmann/json.hpp"
#include "tests/support/test_data.h"
#include "worker/weights/checkpoint.h"

namespace nibble::testing {

inline constexpr const char* kSmolFolder = "models/smollm2-135m-awq-gemm-g64";

inline nlohmann::json ReadJson(const std::string& path) {
  std::ifstream file(path);
  CHECK_MSG(file.good(), path);
  return nlohmann::json::parse(file);
}

struct GoldenPrompt {
  std::string name;
  std::vector<int32_t> prompt;
  std::vector<int32_t> generated;
  std::vector<float> logprobs;  // of the generated tokens
  std::vector<float> margins;   // best logit minus second best, of each step
};

inline std::vector<GoldenPrompt> ReadGoldens(const std::string& folder) {
  std::vector<GoldenPrompt> goldens;
  const nlohmann::json file = ReadJson(folder + "/goldens.json");
  for (const nlohmann::json& entry : file.at("prompts")) {
    GoldenPrompt golden{.name = entry.at("name").get<std::string>(),
                        .prompt = entry.at("prompt_token_ids").get<std::vector<int32_t>>(),
                        .generated = entry.at("generated_token_ids").get<std::vector<int32_t>>(),
                        .logprobs = {},
                        .margins = {}};
    for (const nlohmann::json& step : entry.at("steps")) {
      golden.logprobs.push_back(step.at("top5").at(0).at(1).get<float>());
      golden.margins.push_back(step.at("margin").get<float>());
    }
    goldens.push_back(std::move(golden));
  }
  return goldens;
}

// Opened once per test program; nullptr, with one line that says so, where the data is absent.
inline const weights::Checkpoint* SmolCheckpoint(const char* tests) {
  static const std::optional<std::string> folder = TestData(kSmolFolder, tests);
  if (!folder.has_value()) return nullptr;
  static const std::unique_ptr<weights::Checkpoint> checkpoint = [] {
    auto opened = weights::Checkpoint::Open(*folder);
    CHECK_MSG(opened.ok(), opened.status().ToString());
    return std::move(*opened);
  }();
  return checkpoint.get();
}

}  // namespace nibble::testing
