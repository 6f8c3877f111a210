// One choice's token ids into the text and events that its client may see.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <unordered_set>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "services/gateway/stop_matcher.h"
#include "services/text/tokenizer.h"

namespace nibble::gateway {

struct DecoderOptions {
  bool text = true;
  bool skip_special_tokens = true;
  bool include_stop = false;
  std::vector<std::string> stops = {};
  // One of these ends the choice; end-of-sequence ids included.
  std::vector<int32_t> stop_ids = {};
  int32_t min_tokens = 0;  // stop strings are not looked for before
  // The end of the prompt that the text continues; empty = a text of its own.
  std::vector<int32_t> before = {};
};

// One thread.
class StreamDecoder {
 public:
  // What ended the choice from the gateway's side; kNone while it goes on.
  enum class End { kNone, kStopId, kStopString };

  StreamDecoder(const text::Tokenizer& tokenizer, DecoderOptions options);

  // Decodes one token; appends what may be shown to *text. After anything but kNone the choice has
  // ended: *text is complete and later tokens of the same message are dropped by the caller.
  // INTERNAL when the tokenizer cannot decode the id.
  [[nodiscard]] absl::StatusOr<End> Push(int32_t token_id, std::string* text);
  // The end came from elsewhere (length): appends what was held back.
  [[nodiscard]] absl::StatusOr<End> Finish(std::string* text);

  [[nodiscard]] int32_t token_count() const { return token_count_; }
  [[nodiscard]] const std::string& matched_stop() const { return matched_stop_; }

 private:
  [[nodiscard]] End Emit(const std::string& piece, std::string* text);

  DecoderOptions options_;
  std::unique_ptr<text::TokenStream> stream_;  // nullptr where no text is needed
  StopMatcher matcher_;
  std::unordered_set<int32_t> stop_ids_;
  std::string matched_stop_;
  int32_t token_count_ = 0;
};

}  // namespace nibble::gateway
