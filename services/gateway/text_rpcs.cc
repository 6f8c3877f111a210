#include "services/gateway/text_rpcs.h"

#include <memory>
#include <utility>
#include <vector>

#include "base/grpc_status.h"
#include "base/status.h"
#include "services/gateway/message_codec.h"
#include "services/gateway/prompt_encoding.h"

namespace nibble::gateway {
namespace {

namespace pb = inference::v1;
using MessagePtr = std::unique_ptr<google::protobuf::Message>;

std::vector<FieldViolation> CheckTokenize(const Admission& admission,
                                          const pb::TokenizeRequest& request) {
  std::vector<FieldViolation> violations;
  admission.CheckModelName(request.model(), "model", &violations);
  switch (request.input_case()) {
    case pb::TokenizeRequest::kText:
      admission.CheckText(request.text(), "text", &violations);
      break;
    case pb::TokenizeRequest::kChat:
      admission.CheckConversation(
          request.chat().messages(),
          request.chat().has_tools_json() ? &request.chat().tools_json() : nullptr, "chat.",
          &violations);
      break;
    case pb::TokenizeRequest::INPUT_NOT_SET:
      violations.push_back({"input", "is not set; give text or chat"});
  }
  return violations;
}

absl::StatusOr<MessagePtr> Tokenize(const ServedModel& model, const pb::TokenizeRequest& request,
                                    const std::string& today) {
  auto response = std::make_unique<pb::TokenizeResponse>();
  std::vector<int32_t> ids;
  if (request.input_case() == pb::TokenizeRequest::kText) {
    const bool add_special = !request.has_add_special_tokens() || request.add_special_tokens();
    ASSIGN_OR_RETURN(ids, EncodeText(model, request.text(), add_special));
  } else {
    const pb::Conversation& chat = request.chat();
    const ChatPrompt prompt = {
        .messages = &chat.messages(),
        .tools_json = chat.has_tools_json() ? &chat.tools_json() : nullptr,
        .add_generation_prompt = !chat.has_add_generation_prompt() || chat.add_generation_prompt(),
        .today = today,
        .prefix = "chat."};
    ASSIGN_OR_RETURN(ids, EncodeChat(model, prompt));
    ASSIGN_OR_RETURN(std::string rendered, RenderChat(model, prompt));
    response->set_rendered(std::move(rendered));
  }
  response->mutable_token_ids()->Add(ids.begin(), ids.end());
  return response;
}

}  // namespace

void TokenizeCall::Run(const grpc::ByteBuffer& bytes) {
  auto request = std::make_shared<pb::TokenizeRequest>();
  const absl::Status parsed = ParseMessage(bytes, request.get());
  if (!parsed.ok()) return Reply(parsed);
  const auto violations = CheckTokenize(core().admission, *request);
  if (!violations.empty()) return Reply(InvalidFieldsError(violations));
  const auto model = ModelOrStatus(&core(), caller().get(), core().router.Resolve(request->model()),
                                   request->model(), "model");
  if (!model.ok()) return Reply(model.status());
  ReplyFromPool(request->ByteSizeLong(), [request, model = *model, today = core().today] {
    return Tokenize(*model, *request, today());
  });
}

void DetokenizeCall::Run(const grpc::ByteBuffer& bytes) {
  auto request = std::make_shared<pb::DetokenizeRequest>();
  const absl::Status parsed = ParseMessage(bytes, request.get());
  if (!parsed.ok()) return Reply(parsed);
  const Resolution resolution = core().router.Resolve(request->model());
  std::vector<FieldViolation> violations;
  core().admission.CheckModelName(request->model(), "model", &violations);
  core().admission.CheckTokenIds(request->token_ids(), "token_ids", resolution.model.get(),
                                 &violations);
  if (!violations.empty()) return Reply(InvalidFieldsError(violations));
  const auto model = ModelOrStatus(&core(), caller().get(), resolution, request->model(), "model");
  if (!model.ok()) return Reply(model.status());
  ReplyFromPool(request->ByteSizeLong(), [request, model = *model]() -> absl::StatusOr<MessagePtr> {
    const std::vector<int32_t> ids(request->token_ids().begin(), request->token_ids().end());
    const bool skip = !request->has_skip_special_tokens() || request->skip_special_tokens();
    auto response = std::make_unique<pb::DetokenizeResponse>();
    ASSIGN_OR_RETURN(*response->mutable_text(), model->tokenizer->Decode(ids, skip));
    return response;
  });
}

}  // namespace nibble::gateway
