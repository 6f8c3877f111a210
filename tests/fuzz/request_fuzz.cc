// Bytes as a request, to the gateway and to a leader: a status that names fields, or a request
// whose every value the engine can take as it is.
#include <google/protobuf/stubs/logging.h>
#include <nibble/inference/v1/inference.pb.h>
#include <nibble/worker/v1/worker.pb.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "base/check.h"
#include "base/clock.h"
#include "services/gateway/admission.h"
#include "worker/rpc/request_validation.h"

namespace nibble {
namespace {

constexpr rpc::RequestLimits kLimits = {.vocab_size = 100, .max_context = 64};

class StoppedClock final : public Clock {
 public:
  [[nodiscard]] Deadline Now() const override { return Deadline(std::chrono::hours(1)); }
};

bool InVocabulary(int32_t id) { return id >= 0 && id < kLimits.vocab_size; }

void CheckSampling(const step::SamplingParams& sampling) {
  CHECK(std::isfinite(sampling.temperature) && sampling.temperature >= 0);
  CHECK(sampling.top_p > 0 && sampling.top_p <= 1);
  CHECK(sampling.min_p >= 0 && sampling.min_p <= 1);
  CHECK(sampling.typical_p > 0 && sampling.typical_p <= 1);
  CHECK(sampling.top_k >= 0);
  CHECK(std::isfinite(sampling.repetition_penalty) && sampling.repetition_penalty > 0);
  CHECK(std::isfinite(sampling.presence_penalty) && std::isfinite(sampling.frequency_penalty));
}

void TryAtLeader(const worker::v1::GenerateRequest& request) {
  const StoppedClock clock;
  const auto taken = rpc::ToEngineRequest(request, kLimits, Deadline::max(), clock);
  if (!taken.ok()) {
    CHECK(absl::IsInvalidArgument(taken.status()));
    CHECK(!taken.status().message().empty());
    return;
  }
  CHECK(!taken->prompt.empty());
  CHECK(taken->prompt.size() < static_cast<size_t>(kLimits.max_context));
  CHECK(std::all_of(taken->prompt.begin(), taken->prompt.end(), InVocabulary));
  CHECK(std::all_of(taken->stop_ids.begin(), taken->stop_ids.end(), InVocabulary));
  CHECK(taken->max_tokens >= 1 && taken->min_tokens >= 0);
  CHECK(taken->logprobs >= -1 && taken->logprobs <= 20);
  CHECK(taken->queue_deadline >= clock.Now());
  CheckSampling(taken->sampling);
}

void TryAtGateway(const gateway::GenerationInput& input) {
  const gateway::Admission admission{gateway::Limits()};
  for (const FieldViolation& violation : admission.CheckFields(input, nullptr)) {
    CHECK(!violation.field.empty() && !violation.description.empty());
  }
}

template <typename Message, typename Try>
void Parsed(const uint8_t* data, size_t size, const Try& attempt) {
  Message message;
  if (message.ParseFromArray(data, static_cast<int>(size))) attempt(message);
}

}  // namespace
}  // namespace nibble

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace nibble;  // NOLINT(google-build-using-namespace)
  const google::protobuf::LogSilencer silent;
  Parsed<worker::v1::GenerateRequest>(data, size, [](const auto& m) { TryAtLeader(m); });
  Parsed<inference::v1::GenerateRequest>(
      data, size, [](const auto& m) { TryAtGateway(gateway::InputOf(m, "")); });
  Parsed<inference::v1::ChatRequest>(data, size,
                                     [](const auto& m) { TryAtGateway(gateway::InputOf(m, "")); });
  return 0;
}
