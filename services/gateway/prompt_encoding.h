// Prompts into token ids, with a model's tokenizer and chat template.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "nibble/inference/v1/inference.pb.h"
#include "services/gateway/admission.h"
#include "services/gateway/served_model.h"

namespace nibble::gateway {

struct ChatPrompt {
  const google::protobuf::RepeatedPtrField<inference::v1::ChatMessage>* messages = nullptr;
  const std::string* tools_json = nullptr;  // nullptr = none
  bool add_generation_prompt = true;
  std::string today;
  std::string prefix;  // of field names in errors
};

// What Generate sends for `text`; Tokenize shows the same.
[[nodiscard]] absl::StatusOr<std::vector<int32_t>> EncodeText(const ServedModel& model,
                                                              const std::string& text,
                                                              bool add_special);
// FAILED_PRECONDITION (CAPABILITY) where the model has no chat template, INVALID_ARGUMENT with the
// template's own message where it refuses the conversation.
[[nodiscard]] absl::StatusOr<std::vector<int32_t>> EncodeChat(const ServedModel& model,
                                                              const ChatPrompt& chat);
[[nodiscard]] absl::StatusOr<std::string> RenderChat(const ServedModel& model,
                                                     const ChatPrompt& chat);

// The prompt of a request whose fields have been checked.
[[nodiscard]] absl::StatusOr<std::vector<int32_t>> EncodePrompt(const ServedModel& model,
                                                                const GenerationInput& input,
                                                                const std::string& today);

}  // namespace nibble::gateway
