#include "services/gateway/model_rpcs.h"

#include <map>
#include <memory>
#include <string>
#include <utility>

#include "base/grpc_status.h"
#include "services/gateway/message_codec.h"
#include "services/gateway/status_contract.h"

namespace nibble::gateway {
namespace {

namespace pb = inference::v1;

void FillSampling(const SamplingDefaults& defaults, pb::SamplingParams* sampling) {
  sampling->set_temperature(defaults.temperature);
  sampling->set_top_p(defaults.top_p);
  sampling->set_top_k(defaults.top_k);
  sampling->set_min_p(defaults.min_p);
  sampling->set_typical_p(defaults.typical_p);
  sampling->set_presence_penalty(defaults.presence_penalty);
  sampling->set_frequency_penalty(defaults.frequency_penalty);
  sampling->set_repetition_penalty(defaults.repetition_penalty);
  sampling->set_n(1);
}

// The best state of a model's groups counts.
pb::ModelState StateOf(const GroupSnapshot& group) {
  if (group.ready) return pb::MODEL_STATE_READY;
  if (!group.connected) return pb::MODEL_STATE_UNAVAILABLE;
  return group.load.draining() ? pb::MODEL_STATE_DRAINING : pb::MODEL_STATE_LOADING;
}

int Rank(pb::ModelState state) {
  switch (state) {
    case pb::MODEL_STATE_READY:
      return 3;
    case pb::MODEL_STATE_LOADING:
      return 2;
    case pb::MODEL_STATE_DRAINING:
      return 1;
    default:
      return 0;
  }
}

void Describe(const ServedModel& served, pb::Model* model) {
  model->set_context_length(served.info.context_length());
  model->set_vocab_size(served.info.vocab_size());
  model->set_architecture(served.info.architecture());
  model->set_quantization(served.info.quantization());
  model->set_tensor_parallel(served.info.tensor_parallel());
  model->set_chat(served.tokenizer->has_chat_template());
  FillSampling(served.defaults.sampling, model->mutable_default_sampling());
}

}  // namespace

std::vector<pb::Model> DescribeModels(Core* core) {
  std::map<std::string, pb::Model> by_name;
  for (const GroupSnapshot& group : core->router.Snapshot()) {
    if (group.model.empty()) continue;
    pb::Model& model = by_name[group.model];
    if (model.name().empty()) {
      model.set_name(group.model);
      model.set_state(pb::MODEL_STATE_UNAVAILABLE);
      const Resolution resolution = core->router.Resolve(group.model);
      if (resolution.model != nullptr) Describe(*resolution.model, &model);
    }
    if (group.ready) model.set_groups_ready(model.groups_ready() + 1);
    const pb::ModelState state = StateOf(group);
    if (Rank(state) > Rank(model.state())) model.set_state(state);
  }
  std::vector<pb::Model> models;
  for (auto& [name, model] : by_name) models.push_back(std::move(model));
  return models;
}

void ListModelsCall::Run(const grpc::ByteBuffer& bytes) {
  pb::ListModelsRequest request;
  const absl::Status parsed = ParseMessage(bytes, &request);
  if (!parsed.ok()) return Reply(parsed);
  auto response = std::make_unique<pb::ListModelsResponse>();
  for (pb::Model& model : DescribeModels(&core())) {
    if (caller() != nullptr && !caller()->MayUse(model.name())) continue;
    *response->add_models() = std::move(model);
  }
  Reply(std::move(response));
}

void GetModelCall::Run(const grpc::ByteBuffer& bytes) {
  pb::GetModelRequest request;
  const absl::Status parsed = ParseMessage(bytes, &request);
  if (!parsed.ok()) return Reply(parsed);
  std::vector<FieldViolation> violations;
  core().admission.CheckModelName(request.name(), "name", &violations);
  if (!violations.empty()) return Reply(InvalidFieldsError(violations));
  const auto served = ModelOrStatus(&core(), caller().get(), core().router.Resolve(request.name()),
                                    request.name(), "name");
  if (!served.ok()) return Reply(served.status());
  auto response = std::make_unique<pb::GetModelResponse>();
  for (pb::Model& model : DescribeModels(&core())) {
    if (model.name() == (*served)->name()) *response->mutable_model() = std::move(model);
  }
  Reply(std::move(response));
}

}  // namespace nibble::gateway
