#include "services/gateway/choice.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <optional>
#include <string>
#include <vector>

#include "tests/unit/services/gateway/test_model.h"

namespace nibble::gateway {
namespace {

namespace pb = inference::v1;
namespace wire = worker::v1;
using ::testing::ElementsAre;

class ChoiceTest : public ::testing::Test {
 protected:
  ChoiceTest() { asked_.set_text("hi"); }

  void Admit() {
    const Admission admission{Limits()};
    request_.emplace(
        *admission.Admit(InputOf(asked_, ""), NewTestModel(), ByteTokenizer::Ids("hi"), 7));
  }
  static wire::Tokens Tokens(const std::string& text, bool eos = false) {
    wire::Tokens tokens;
    for (const int32_t id : ByteTokenizer::Ids(text)) tokens.add_ids(static_cast<uint32_t>(id));
    if (eos) tokens.add_ids(kByteEos);
    return tokens;
  }
  static wire::Finished Finished(wire::FinishReason reason) {
    wire::Finished finished;
    finished.set_reason(reason);
    finished.mutable_prefill()->set_nanos(5);
    return finished;
  }

  pb::GenerateRequest asked_;
  std::optional<AdmittedRequest> request_;
};

TEST_F(ChoiceTest, EosEndsWithItsReasonIdAndUsage) {
  Admit();
  Choice choice(&*request_, 0);
  wire::Admitted admitted;
  admitted.set_cached_prompt_tokens(1);
  choice.OnAdmitted(admitted);
  EXPECT_EQ(choice.OnTokens(Tokens("ab"))->delta->text(), "ab");
  const auto last = choice.OnTokens(Tokens("c", /*eos=*/true));
  EXPECT_EQ(last->delta->text(), "c");
  EXPECT_EQ(last->delta->completion_tokens(), 4U);
  EXPECT_FALSE(last->finished.has_value());  // the worker's own brings the timings
  const auto end = choice.OnFinished(Finished(wire::FINISH_REASON_STOP));
  EXPECT_FALSE(end->delta.has_value());
  EXPECT_EQ(end->finished->reason(), pb::FINISH_REASON_EOS);
  EXPECT_EQ(end->finished->stop_token_id(), static_cast<uint32_t>(kByteEos));
  EXPECT_EQ(end->finished->usage().prompt_tokens(), 2U);
  EXPECT_EQ(end->finished->usage().cached_prompt_tokens(), 1U);
  EXPECT_EQ(end->finished->usage().completion_tokens(), 4U);
  EXPECT_EQ(end->finished->timings().prefill().nanos(), 5);
  EXPECT_TRUE(choice.ended());
}

TEST_F(ChoiceTest, RequestsStopIdIsToldFromEos) {
  asked_.mutable_stopping()->add_stop_token_ids('!');
  Admit();
  Choice choice(&*request_, 1);
  EXPECT_EQ(choice.OnTokens(Tokens("x!"))->delta->text(), "x");
  const auto end = choice.OnFinished(Finished(wire::FINISH_REASON_STOP));
  EXPECT_EQ(end->finished->reason(), pb::FINISH_REASON_STOP);
  EXPECT_EQ(end->finished->stop_token_id(), static_cast<uint32_t>('!'));
  EXPECT_EQ(end->finished->usage().prompt_tokens(), 0U);  // counted once, with choice 0
}

TEST_F(ChoiceTest, StopStringEndsItHereAndDropsTheWorker) {
  asked_.mutable_stopping()->add_stop("END");
  asked_.mutable_output()->set_token_ids(true);
  Admit();
  Choice choice(&*request_, 0);
  EXPECT_EQ(choice.OnTokens(Tokens("aEN"))->delta->text(), "a");
  // One step ahead: the worker has sent more than the stop string; that is not delivered.
  const auto output = choice.OnTokens(Tokens("Dxyz"));
  EXPECT_EQ(output->delta->text(), "");
  EXPECT_THAT(output->delta->token_ids(), ElementsAre('D'));
  EXPECT_TRUE(output->abandon_worker);
  EXPECT_EQ(output->finished->reason(), pb::FINISH_REASON_STOP_STRING);
  EXPECT_EQ(output->finished->stop_string(), "END");
  EXPECT_EQ(output->finished->usage().completion_tokens(), 4U);
}

TEST_F(ChoiceTest, LengthReleasesWhatWasHeld) {
  asked_.mutable_stopping()->add_stop("END");
  asked_.mutable_stopping()->set_max_tokens(3);
  Admit();
  Choice choice(&*request_, 0);
  EXPECT_EQ(choice.OnTokens(Tokens("aEN"))->delta->text(), "a");
  const auto end = choice.OnFinished(Finished(wire::FINISH_REASON_LENGTH));
  EXPECT_EQ(end->delta->text(), "EN");
  EXPECT_EQ(end->finished->reason(), pb::FINISH_REASON_LENGTH);
}

TEST_F(ChoiceTest, LogprobsCarryIdsAndBytes) {
  asked_.mutable_output()->set_logprobs(1);
  Admit();
  Choice choice(&*request_, 0);
  wire::Tokens tokens = Tokens("a");
  auto* logprobs = tokens.add_logprobs();
  logprobs->set_sampled(-0.5F);
  auto* top = logprobs->add_top();
  top->set_token_id('b');
  top->set_logprob(-0.25F);
  const auto output = choice.OnTokens(tokens);
  ASSERT_EQ(output->delta->logprobs_size(), 1);
  EXPECT_EQ(output->delta->logprobs(0).sampled().token(), "a");
  EXPECT_FLOAT_EQ(output->delta->logprobs(0).sampled().logprob(), -0.5F);
  EXPECT_EQ(output->delta->logprobs(0).top(0).token(), "b");
}

// The text waits for a character to be whole; what each token adds to it is told at once.
TEST_F(ChoiceTest, LogprobsOfAPartOfACharacterAreItsBytes) {
  const std::string character = "\u6C49";
  asked_.mutable_output()->set_logprobs(1);
  Admit();
  Choice choice(&*request_, 0);
  std::string text;
  std::string bytes;
  for (const char byte : character) {
    wire::Tokens tokens = Tokens(std::string(1, byte));
    auto* logprobs = tokens.add_logprobs();
    logprobs->add_top()->set_token_id(0xFF);
    const auto output = choice.OnTokens(tokens);
    ASSERT_TRUE(output.ok()) << output.status();
    text += output->delta->text();
    bytes += output->delta->logprobs(0).sampled().token();
    EXPECT_EQ(output->delta->logprobs(0).top(0).token(), "\xFF");
  }
  EXPECT_EQ(bytes, character);
  EXPECT_EQ(text, character);
}

TEST_F(ChoiceTest, WorkersBreachOfContractIsInternal) {
  asked_.mutable_stopping()->set_max_tokens(2);
  asked_.mutable_output()->set_logprobs(0);
  Admit();
  EXPECT_EQ(Choice(&*request_, 0).OnTokens(Tokens("a")).status().code(),
            absl::StatusCode::kInternal);
  asked_.mutable_output()->clear_logprobs();
  Admit();
  EXPECT_EQ(Choice(&*request_, 0).OnTokens(Tokens("abc")).status().code(),
            absl::StatusCode::kInternal);
  EXPECT_EQ(Choice(&*request_, 0).OnFinished(Finished(wire::FINISH_REASON_STOP)).status().code(),
            absl::StatusCode::kInternal);
  Choice choice(&*request_, 0);
  ASSERT_TRUE(choice.OnTokens(Tokens("", /*eos=*/true)).ok());
  EXPECT_EQ(choice.OnTokens(Tokens("a")).status().code(), absl::StatusCode::kInternal);
}

}  // namespace
}  // namespace nibble::gateway
