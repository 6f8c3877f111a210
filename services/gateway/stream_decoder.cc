#include "services/gateway/stream_decoder.h"

#include <utility>

#include "base/status.h"

namespace nibble::gateway {

StreamDecoder::StreamDecoder(const text::Tokenizer& tokenizer, DecoderOptions options)
    : options_(std::move(options)),
      matcher_(options_.stops, options_.include_stop),
      stop_ids_(options_.stop_ids.begin(), options_.stop_ids.end()) {
  if (options_.text || !options_.stops.empty()) {
    stream_ = tokenizer.NewStreamAfter(options_.before, options_.skip_special_tokens);
  }
}

StreamDecoder::End StreamDecoder::Emit(const std::string& piece, std::string* text) {
  if (piece.empty()) return End::kNone;
  if (token_count_ < options_.min_tokens) {
    if (options_.text) text->append(piece);
    return End::kNone;
  }
  StopMatcher::Result result = matcher_.Push(piece);
  if (options_.text) text->append(result.text);
  if (!result.match.has_value()) return End::kNone;
  matched_stop_ = options_.stops[*result.match];
  return End::kStopString;
}

absl::StatusOr<StreamDecoder::End> StreamDecoder::Push(int32_t token_id, std::string* text) {
  ++token_count_;
  const bool is_stop_id = stop_ids_.contains(token_id);
  if (stream_ == nullptr) return is_stop_id ? End::kStopId : End::kNone;
  if (is_stop_id) {
    // Its own text is no part of the answer, unless it was asked for; what was held back is.
    std::string piece;
    if (options_.include_stop) {
      ASSIGN_OR_RETURN(piece, stream_->Push(token_id));
    }
    ASSIGN_OR_RETURN(const End end, Finish(text));
    if (end == End::kStopString) return end;
    if (options_.text) text->append(piece);
    return End::kStopId;
  }
  ASSIGN_OR_RETURN(const std::string piece, stream_->Push(token_id));
  return Emit(piece, text);
}

absl::StatusOr<StreamDecoder::End> StreamDecoder::Finish(std::string* text) {
  if (stream_ == nullptr) return End::kNone;
  ASSIGN_OR_RETURN(const std::string rest, stream_->Finish());
  const End end = Emit(rest, text);
  if (end == End::kStopString) return end;
  const std::string held = matcher_.Flush();
  if (options_.text) text->append(held);
  return End::kNone;
}

}  // namespace nibble::gateway
