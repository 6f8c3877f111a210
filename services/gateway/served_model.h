// A model as the gateway knows it: what its worker groups say, its tokenizer and its defaults.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "nibble/worker/v1/worker.pb.h"
#include "services/gateway/generation_defaults.h"
#include "services/text/tokenizer.h"

namespace nibble::gateway {

// Immutable. Shared: requests in flight go on with the model they were admitted to when a group
// that restarted brings another one under the same name.
struct ServedModel {
  worker::v1::GetModelInfoResponse info;
  std::shared_ptr<const text::Tokenizer> tokenizer;
  GenerationDefaults defaults;

  [[nodiscard]] const std::string& name() const { return info.model(); }
};

}  // namespace nibble::gateway
