// The gate: checks every field of a request and alone makes AdmittedRequest.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/clock.h"
#include "base/grpc_status.h"
#include "nibble/inference/v1/inference.pb.h"
#include "nibble/worker/v1/worker.pb.h"
#include "services/gateway/limits.h"
#include "services/gateway/served_model.h"
#include "services/gateway/stream_decoder.h"

namespace nibble::gateway {

// A Generate or Chat request, whichever RPC it came by. Borrows from the message.
struct GenerationInput {
  std::string prefix;  // before field names in errors: "request." where the message is wrapped
  const std::string* model = nullptr;
  const std::string* request_id = nullptr;
  const inference::v1::SamplingParams* sampling = nullptr;
  const inference::v1::StoppingCriteria* stopping = nullptr;
  const inference::v1::OutputOptions* output = nullptr;
  const google::protobuf::Duration* queue_timeout = nullptr;  // nullptr = unset
  bool bypass_prefix_cache = false;
  // The prompt: at most one of these; none where the client set none.
  const std::string* text = nullptr;
  const inference::v1::TokenIds* token_ids = nullptr;
  const google::protobuf::RepeatedPtrField<inference::v1::ChatMessage>* messages = nullptr;
  const std::string* tools_json = nullptr;  // nullptr = unset
};

[[nodiscard]] GenerationInput InputOf(const inference::v1::GenerateRequest& request,
                                      std::string prefix);
[[nodiscard]] GenerationInput InputOf(const inference::v1::ChatRequest& request,
                                      std::string prefix);

// Proof that every check passed: nothing downstream checks again. Move-only value.
class AdmittedRequest {
 public:
  AdmittedRequest(AdmittedRequest&&) = default;
  AdmittedRequest& operator=(AdmittedRequest&&) = default;

  // Choice i's request to the worker, but for request_id: that names an attempt.
  [[nodiscard]] worker::v1::GenerateRequest WorkerRequest(uint32_t choice) const;
  [[nodiscard]] DecoderOptions NewDecoderOptions() const { return decoder_; }
  [[nodiscard]] inference::v1::Started NewStarted() const;

  [[nodiscard]] const ServedModel& model() const { return *model_; }
  [[nodiscard]] uint32_t n() const { return n_; }
  [[nodiscard]] uint64_t seed() const { return seed_; }
  [[nodiscard]] uint32_t max_tokens() const { return worker_request_.max_tokens(); }
  [[nodiscard]] uint32_t prompt_tokens() const {
    return static_cast<uint32_t>(worker_request_.prompt_token_ids_size());
  }
  [[nodiscard]] bool wants_token_ids() const { return token_ids_; }
  [[nodiscard]] bool wants_logprobs() const { return worker_request_.has_logprobs(); }
  [[nodiscard]] bool IsEos(int32_t token_id) const;

 private:
  friend class Admission;
  AdmittedRequest() = default;

  std::shared_ptr<const ServedModel> model_;
  worker::v1::GenerateRequest worker_request_;
  DecoderOptions decoder_;
  uint32_t n_ = 1;
  uint64_t seed_ = 0;
  bool token_ids_ = false;
};

// Pure and thread-safe.
class Admission {
 public:
  explicit Admission(const Limits& limits) : limits_(limits) {}

  // Every violation that can be known before tokens are; `model` may be nullptr when it is not
  // known, which leaves out what depends on its vocabulary and context.
  [[nodiscard]] std::vector<FieldViolation> CheckFields(const GenerationInput& input,
                                                        const ServedModel* model) const;

  // REQUIRES: CheckFields(input, model) found nothing. INVALID_ARGUMENT when the prompt is empty
  // or does not fit the context together with max_tokens (CONTEXT_LENGTH_EXCEEDED). `drawn_seed` is
  // used where the client gave none.
  [[nodiscard]] absl::StatusOr<AdmittedRequest> Admit(const GenerationInput& input,
                                                      std::shared_ptr<const ServedModel> model,
                                                      std::span<const int32_t> prompt,
                                                      uint64_t drawn_seed) const;

  // Shared with Tokenize. `field` is the path of the conversation's messages.
  void CheckConversation(
      const google::protobuf::RepeatedPtrField<inference::v1::ChatMessage>& messages,
      const std::string* tools_json, const std::string& prefix,
      std::vector<FieldViolation>* violations) const;
  void CheckText(const std::string& text, const std::string& field,
                 std::vector<FieldViolation>* violations) const;
  void CheckTokenIds(const google::protobuf::RepeatedField<uint32_t>& ids, const std::string& field,
                     const ServedModel* model, std::vector<FieldViolation>* violations) const;
  void CheckModelName(const std::string& name, const std::string& field,
                      std::vector<FieldViolation>* violations) const;

 private:
  [[nodiscard]] absl::Status CheckContext(const GenerationInput& input, const ServedModel& model,
                                          size_t prompt_tokens) const;

  Limits limits_;
};

}  // namespace nibble::gateway
