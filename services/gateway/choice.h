// One answer of a request: the worker's events for it into the client's.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "base/clock.h"
#include "nibble/inference/v1/inference.pb.h"
#include "nibble/worker/v1/worker.pb.h"
#include "services/gateway/admission.h"
#include "services/gateway/stream_decoder.h"

namespace nibble::gateway {

// One attempt at one choice. One thread at a time; the request outlives it.
class Choice {
 public:
  Choice(const AdmittedRequest* request, uint32_t index);

  struct Output {
    std::optional<inference::v1::Delta> delta;
    std::optional<inference::v1::Finished> finished;  // the choice has ended: no call after this
    // The worker does not know yet: its stream is to be dropped.
    bool abandon_worker = false;
  };

  void OnAdmitted(const worker::v1::Admitted& admitted);
  // INTERNAL when the worker sends what it was not asked for, or after its end.
  [[nodiscard]] absl::StatusOr<Output> OnTokens(const worker::v1::Tokens& tokens);
  [[nodiscard]] absl::StatusOr<Output> OnFinished(const worker::v1::Finished& finished);

  [[nodiscard]] bool ended() const { return ended_; }
  [[nodiscard]] uint32_t token_count() const {
    return static_cast<uint32_t>(decoder_.token_count());
  }

 private:
  [[nodiscard]] absl::Status CheckTokens(const worker::v1::Tokens& tokens) const;
  [[nodiscard]] absl::Status AppendLogprobs(const worker::v1::TokenLogprobs& from,
                                            uint32_t token_id, inference::v1::Delta* delta) const;
  [[nodiscard]] absl::Status FillLogprob(uint32_t token_id, float logprob,
                                         inference::v1::TokenLogprob* entry) const;
  [[nodiscard]] inference::v1::Finished NewFinished() const;

  const AdmittedRequest& request_;
  const uint32_t index_;
  StreamDecoder decoder_;
  uint32_t cached_prompt_tokens_ = 0;
  // Sampled a stop id: the end is known here, the worker's Finished brings the timings.
  std::optional<uint32_t> stop_id_;
  bool ended_ = false;
};

}  // namespace nibble::gateway
