#include "services/gateway/prompt_encoding.h"

#include "base/grpc_status.h"
#include "base/status.h"

namespace nibble::gateway {
namespace {

std::vector<text::ChatMessage> Messages(const ChatPrompt& chat) {
  std::vector<text::ChatMessage> messages;
  for (const inference::v1::ChatMessage& message : *chat.messages) {
    messages.push_back({.role = message.role(),
                        .content = message.content(),
                        .name = message.name(),
                        .tool_calls_json = message.tool_calls_json(),
                        .tool_call_id = message.tool_call_id()});
  }
  return messages;
}

text::ChatOptions Options(const ChatPrompt& chat) {
  return {.add_generation_prompt = chat.add_generation_prompt,
          .tools_json = chat.tools_json == nullptr ? std::string() : *chat.tools_json,
          .date_string = chat.today};
}

// The tokenizer's errors in the contract's terms.
absl::Status ForField(const absl::Status& status, const std::string& field) {
  if (status.code() == absl::StatusCode::kInvalidArgument) {
    const FieldViolation violation = {field, std::string(status.message())};
    return InvalidFieldsError({&violation, 1});
  }
  absl::Status result = status;
  if (status.code() == absl::StatusCode::kFailedPrecondition) {
    SetErrorInfo(&result, reason::kCapability);
  } else if (status.code() == absl::StatusCode::kResourceExhausted) {
    SetErrorInfo(&result, reason::kOverloaded);
  }
  return result;
}

}  // namespace

absl::StatusOr<std::vector<int32_t>> EncodeText(const ServedModel& model, const std::string& text,
                                                bool add_special) {
  ASSIGN_OR_RETURN(std::vector<int32_t> ids,
                   model.tokenizer->Encode(text, add_special, /*parse_special=*/true));
  if (add_special) DropDoubleBos(model.tokenizer->bos_id(), &ids);
  return ids;
}

absl::StatusOr<std::vector<int32_t>> EncodeChat(const ServedModel& model, const ChatPrompt& chat) {
  auto ids = model.tokenizer->EncodeChat(Messages(chat), Options(chat));
  if (!ids.ok()) return ForField(ids.status(), chat.prefix + "messages");
  DropDoubleBos(model.tokenizer->bos_id(), &*ids);
  return ids;
}

absl::StatusOr<std::string> RenderChat(const ServedModel& model, const ChatPrompt& chat) {
  auto text = model.tokenizer->RenderChat(Messages(chat), Options(chat));
  if (!text.ok()) return ForField(text.status(), chat.prefix + "messages");
  return text;
}

absl::StatusOr<std::vector<int32_t>> EncodePrompt(const ServedModel& model,
                                                  const GenerationInput& input,
                                                  const std::string& today) {
  if (input.token_ids != nullptr) {
    return std::vector<int32_t>(input.token_ids->ids().begin(), input.token_ids->ids().end());
  }
  if (input.messages != nullptr) {
    return EncodeChat(model, {.messages = input.messages,
                              .tools_json = input.tools_json,
                              .add_generation_prompt = true,
                              .today = today,
                              .prefix = input.prefix});
  }
  auto ids = EncodeText(model, *input.text, /*add_special=*/true);
  if (!ids.ok()) return ForField(ids.status(), input.prefix + "text");
  return ids;
}

}  // namespace nibble::gateway
