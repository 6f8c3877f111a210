// Where a request's output goes in tests: writes everything down and holds the engine to its
// promises, token by token, against the fake executor's rule.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/fake_executor.h"
#include "worker/engine/engine.h"

namespace nibble::testing {

class CheckingSink : public engine::Sink {
 public:
  // `outputs_max` is what the engine may deliver at most: max_tokens, or what the context leaves.
  CheckingSink(const engine::Request& request, int32_t vocab_size, int32_t outputs_max)
      : seed_(request.seed),
        prompt_tokens_(static_cast<int32_t>(request.prompt.size())),
        stop_ids_(request.stop_ids),
        min_tokens_(request.min_tokens),
        logprobs_(request.logprobs),
        vocab_size_(vocab_size),
        outputs_max_(outputs_max) {}

  // Called at the end of each callback, on the engine thread.
  std::function<void()> on_admitted = [] {};
  std::function<void(size_t tokens)> on_tokens = [](size_t) {};
  std::function<void()> on_finished = [] {};

  void OnAdmitted(int32_t cached_prompt_tokens) override {
    if (admitted_) Broken("was admitted twice");
    if (finish_.has_value()) Broken("was admitted after its end");
    if (cached_prompt_tokens < 0 || cached_prompt_tokens >= prompt_tokens_) {
      Broken("has more cached tokens than its prompt may");
    }
    cached_tokens_ = cached_prompt_tokens;
    admitted_ = true;
    on_admitted();
  }

  void OnTokens(std::span<const engine::OutputToken> tokens) override {
    if (!admitted_) Broken("got tokens before it was admitted");
    if (finish_.has_value()) Broken("got tokens after its end");
    if (tokens.empty()) Broken("got no tokens at all");
    for (const engine::OutputToken& token : tokens) CheckToken(token);
    on_tokens(tokens_.size());
  }

  void OnFinished(const engine::Finish& finish) override {
    if (finish_.has_value()) Broken("ended twice");
    if (finish.completion_tokens != static_cast<int32_t>(tokens_.size())) {
      Broken("was charged for other tokens than it got");
    }
    if (finish.cached_prompt_tokens != cached_tokens_) Broken("heard of other cached tokens");
    if (finish.status.ok()) CheckReason(finish.reason);
    {
      const std::lock_guard lock(mutex_);
      finish_ = finish;
    }
    on_finished();
    finished_.notify_all();
  }

  // Any thread; blocks.
  void WaitForEnd() {
    std::unique_lock lock(mutex_);
    finished_.wait(lock, [this] { return finish_.has_value(); });
  }

  // The rest: on the engine thread, or after WaitForEnd().
  [[nodiscard]] bool admitted() const { return admitted_; }
  [[nodiscard]] int32_t cached_tokens() const { return cached_tokens_; }
  [[nodiscard]] bool ended() const { return finish_.has_value(); }
  [[nodiscard]] const engine::Finish& finish() const { return finish_.value(); }
  [[nodiscard]] absl::StatusCode code() const { return finish_.value().status.code(); }
  [[nodiscard]] const std::vector<int32_t>& tokens() const { return tokens_; }
  // The first broken promise; empty when none was.
  [[nodiscard]] const std::string& broken() const { return broken_; }

 private:
  void Broken(const char* what) {
    if (broken_.empty()) broken_ = what;
  }

  void CheckToken(const engine::OutputToken& token) {
    const auto index = static_cast<int32_t>(tokens_.size());
    if (token.token_id != FakeToken(seed_, index, vocab_size_, stop_ids_, min_tokens_)) {
      Broken("got a token that is not its own");
    }
    if (index >= outputs_max_) Broken("got more tokens than it may");
    if (index > min_tokens_ && IsStop(tokens_.back())) Broken("got a token after a stop id");
    if (token.top.size() != static_cast<size_t>(std::max(logprobs_, 0))) {
      Broken("got another number of alternatives than it asked for");
    }
    if (logprobs_ >= 0 && token.logprob != FakeLogprob(seed_, index, 0)) {
      Broken("got another log-probability");
    }
    for (size_t rank = 0; rank < token.top.size(); ++rank) {
      if (token.top[rank].logprob != FakeLogprob(seed_, index, static_cast<int32_t>(rank))) {
        Broken("got another's alternatives");
      }
    }
    tokens_.push_back(token.token_id);
  }

  void CheckReason(engine::FinishReason reason) {
    const auto count = static_cast<int32_t>(tokens_.size());
    const bool stopped = count > min_tokens_ && IsStop(tokens_.back());
    if (stopped != (reason == engine::FinishReason::kStop)) Broken("ended for another reason");
    if (!stopped && count != outputs_max_) Broken("ended before its length");
  }

  bool IsStop(int32_t token_id) const {
    return std::find(stop_ids_.begin(), stop_ids_.end(), token_id) != stop_ids_.end();
  }

  const uint64_t seed_;
  const int32_t prompt_tokens_;
  const std::vector<int32_t> stop_ids_;
  const int32_t min_tokens_;
  const int32_t logprobs_;
  const int32_t vocab_size_;
  const int32_t outputs_max_;
  bool admitted_ = false;
  int32_t cached_tokens_ = 0;
  std::vector<int32_t> tokens_;
  std::string broken_;
  std::mutex mutex_;
  std::condition_variable finished_;
  std::optional<engine::Finish> finish_;
};

}  // namespace nibble::testing
