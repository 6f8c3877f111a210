// A model for unit tests of the gateway.
#pragma once

#include <memory>
#include <string>

#include "services/gateway/served_model.h"
#include "tests/unit/services/gateway/byte_tokenizer.h"

namespace nibble::gateway {

inline std::shared_ptr<ServedModel> NewTestModel(uint32_t context_length = 64) {
  auto model = std::make_shared<ServedModel>();
  model->info.set_model("m");
  model->info.set_vocab_size(kByteVocab);
  model->info.set_context_length(context_length);
  model->info.set_max_sequences(8);
  model->tokenizer = std::make_shared<ByteTokenizer>();
  model->defaults.eos_ids = {kByteEos};
  return model;
}

}  // namespace nibble::gateway
