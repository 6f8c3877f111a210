#include "services/gateway/admission.h"

#include <gmock/gmock.h>
#include <google/protobuf/descriptor.h>
#include <google/protobuf/util/message_differencer.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/unit/services/gateway/test_model.h"

namespace nibble::gateway {
namespace {

namespace pb = inference::v1;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

class AdmissionTest : public ::testing::Test {
 protected:
  AdmissionTest() { request_.set_text("hello"); }

  std::vector<std::string> BadFields() {
    std::vector<std::string> fields;
    for (const FieldViolation& violation :
         admission_.CheckFields(InputOf(request_, ""), model_.get())) {
      fields.push_back(violation.field);
    }
    return fields;
  }
  absl::StatusOr<AdmittedRequest> Admit(size_t prompt_tokens = 5) {
    return admission_.Admit(InputOf(request_, ""), model_, std::vector<int32_t>(prompt_tokens, 'x'),
                            99);
  }

  std::shared_ptr<ServedModel> model_ = NewTestModel();
  Admission admission_{Limits()};
  pb::GenerateRequest request_;
  pb::SamplingParams& sampling_ = *request_.mutable_sampling();
  pb::StoppingCriteria& stopping_ = *request_.mutable_stopping();
  pb::OutputOptions& output_ = *request_.mutable_output();
};

TEST_F(AdmissionTest, BareRequestPasses) { EXPECT_THAT(BadFields(), IsEmpty()); }

TEST_F(AdmissionTest, NamesEveryBadFieldAtOnce) {
  request_.set_model(std::string(257, 'm'));
  request_.set_request_id("has space");
  request_.set_text("");
  sampling_.set_temperature(std::nanf(""));
  sampling_.set_top_p(0);
  sampling_.set_top_k(0xFFFFFFFF);
  sampling_.set_min_p(1.5F);
  sampling_.set_typical_p(-1);
  sampling_.set_presence_penalty(3);
  sampling_.set_frequency_penalty(-3);
  sampling_.set_repetition_penalty(0);
  sampling_.set_n(9);
  (*sampling_.mutable_logit_bias())[kByteVocab] = 1;
  stopping_.set_max_tokens(0);
  stopping_.set_min_tokens(0xFFFFFFFF);
  stopping_.add_stop("");
  stopping_.add_stop("ok");
  stopping_.add_stop(std::string(257, 's'));
  stopping_.add_stop_token_ids(kByteVocab);
  output_.set_logprobs(21);
  request_.mutable_queue_timeout()->set_seconds(-1);
  EXPECT_THAT(
      BadFields(),
      ElementsAre("model", "request_id", "text", "sampling.temperature", "sampling.top_p",
                  "sampling.min_p", "sampling.typical_p", "sampling.presence_penalty",
                  "sampling.frequency_penalty", "sampling.repetition_penalty", "sampling.top_k",
                  "sampling.n", "sampling.logit_bias", "stopping.max_tokens", "stopping.min_tokens",
                  "stopping.stop[0]", "stopping.stop[2]", "stopping.stop_token_ids",
                  "output.logprobs", "queue_timeout"));
}

// The table of the contract: for each number the last good value and the first bad one.
struct FloatEdge {
  const char* field;
  std::vector<float> good;
  std::vector<float> bad;
};

TEST_F(AdmissionTest, EveryFloatFieldHasItsRange) {
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::nanf("");
  const std::vector<FloatEdge> edges = {
      {"temperature", {0, 1e-30F, 1, 100}, {-1e-30F, 100.01F, inf, -inf, nan}},
      {"top_p", {1e-30F, 0.5F, 1}, {0, -1, 1.0001F, inf, nan}},
      {"min_p", {0, 0.5F, 1}, {-1e-30F, 1.0001F, inf, nan}},
      {"typical_p", {1e-30F, 1}, {0, -1, 1.0001F, inf, nan}},
      {"presence_penalty", {-2, 0, 2}, {-2.0001F, 2.0001F, inf, nan}},
      {"frequency_penalty", {-2, 0, 2}, {-2.0001F, 2.0001F, inf, nan}},
      {"repetition_penalty", {0.01F, 1, 10}, {0, 0.0099F, 10.01F, -1, inf, nan}}};
  const auto* type = pb::SamplingParams::descriptor();
  int float_fields = 0;
  for (int i = 0; i < type->field_count(); ++i) {
    if (type->field(i)->cpp_type() == google::protobuf::FieldDescriptor::CPPTYPE_FLOAT) {
      ++float_fields;
    }
  }
  EXPECT_EQ(edges.size(), static_cast<size_t>(float_fields)) << "a new field needs a row here";
  for (const FloatEdge& edge : edges) {
    const auto* field = type->FindFieldByName(edge.field);
    ASSERT_NE(field, nullptr);
    const auto* reflection = sampling_.GetReflection();
    for (const float value : edge.good) {
      reflection->SetFloat(&sampling_, field, value);
      EXPECT_THAT(BadFields(), IsEmpty()) << edge.field << " " << value;
    }
    for (const float value : edge.bad) {
      reflection->SetFloat(&sampling_, field, value);
      EXPECT_THAT(BadFields(), ElementsAre(absl::StrCat("sampling.", edge.field))) << value;
    }
    reflection->ClearField(&sampling_, field);
  }
}

TEST_F(AdmissionTest, CountsHaveTheirCaps) {
  for (int i = 0; i < 16; ++i) stopping_.add_stop(std::string(1, 's'));
  for (uint32_t i = 0; i < 64; ++i) stopping_.add_stop_token_ids(i);
  sampling_.set_n(8);
  output_.set_logprobs(20);
  EXPECT_THAT(BadFields(), IsEmpty());
  stopping_.add_stop("s");
  stopping_.add_stop_token_ids(1);
  EXPECT_THAT(BadFields(), ElementsAre("stopping.stop", "stopping.stop_token_ids"));
}

TEST_F(AdmissionTest, LogitBiasIsCappedAndRanged) {
  model_->info.set_vocab_size(1000);
  for (uint32_t i = 0; i < 300; ++i) (*sampling_.mutable_logit_bias())[i] = 100;
  EXPECT_THAT(BadFields(), IsEmpty());
  (*sampling_.mutable_logit_bias())[300] = 0;
  EXPECT_THAT(BadFields(), ElementsAre("sampling.logit_bias"));
  sampling_.clear_logit_bias();
  for (const float bad : {-100.5F, 100.5F, std::nanf("")}) {
    (*sampling_.mutable_logit_bias())[5] = bad;
    EXPECT_THAT(BadFields(), ElementsAre("sampling.logit_bias")) << bad;
  }
}

TEST_F(AdmissionTest, PromptIsOneThingAndWithinItsBounds) {
  request_.clear_prompt();
  EXPECT_THAT(BadFields(), ElementsAre("prompt"));
  request_.mutable_token_ids();
  EXPECT_THAT(BadFields(), ElementsAre("token_ids.ids"));
  request_.mutable_token_ids()->add_ids(kByteVocab - 1);
  EXPECT_THAT(BadFields(), IsEmpty());
  request_.mutable_token_ids()->add_ids(kByteVocab);
  EXPECT_THAT(BadFields(), ElementsAre("token_ids.ids"));
  request_.set_text(std::string(1 << 20, 'x'));
  EXPECT_THAT(BadFields(), IsEmpty());
  request_.set_text(std::string((1 << 20) + 1, 'x'));
  EXPECT_THAT(BadFields(), ElementsAre("text"));
  request_.set_text(std::string("a\0b", 3));
  EXPECT_THAT(BadFields(), IsEmpty());
}

TEST_F(AdmissionTest, RequestIdIsShortVisibleAscii) {
  request_.set_request_id(std::string(128, 'x'));
  EXPECT_THAT(BadFields(), IsEmpty());
  for (const std::string& bad : {std::string(129, 'x'), std::string("a\nb"), std::string("\""),
                                 std::string("\\"), std::string("\u00e9"), std::string(1, '\0')}) {
    request_.set_request_id(bad);
    EXPECT_THAT(BadFields(), ElementsAre("request_id"));
  }
}

TEST_F(AdmissionTest, QueueTimeoutIsAnAmountOfTime) {
  auto& timeout = *request_.mutable_queue_timeout();
  EXPECT_THAT(BadFields(), IsEmpty());  // zero: no waiting
  timeout.set_seconds(3599);
  timeout.set_nanos(999'999'999);
  EXPECT_THAT(BadFields(), IsEmpty());
  timeout.set_seconds(3600);
  EXPECT_THAT(BadFields(), ElementsAre("queue_timeout"));
  timeout.set_seconds(0);
  timeout.set_nanos(1'000'000'000);
  EXPECT_THAT(BadFields(), ElementsAre("queue_timeout"));
  timeout.set_nanos(-1);
  EXPECT_THAT(BadFields(), ElementsAre("queue_timeout"));
}

TEST_F(AdmissionTest, UnsetMaxTokensGoesToTheEndOfTheContext) {
  const auto admitted = Admit(5);
  ASSERT_TRUE(admitted.ok()) << admitted.status();
  EXPECT_EQ(admitted->max_tokens(), 59U);
  EXPECT_EQ(admitted->NewStarted().max_tokens(), 59U);
  EXPECT_EQ(admitted->seed(), 99U);
}

TEST_F(AdmissionTest, ContextIsNoLargerThanTheKvPool) {
  model_->info.set_kv_blocks(2);
  model_->info.set_block_tokens(16);
  EXPECT_EQ(Admit(5)->max_tokens(), 27U);
}

TEST_F(AdmissionTest, TooLongForTheContextIsToldWithTheLimits) {
  stopping_.set_max_tokens(59);
  EXPECT_TRUE(Admit(5).ok());
  stopping_.set_max_tokens(60);
  const absl::Status too_many = Admit(5).status();
  EXPECT_EQ(too_many.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ErrorReason(too_many), "CONTEXT_LENGTH_EXCEEDED");
  EXPECT_EQ(FieldViolations(too_many)[0].field, "stopping.max_tokens");
  EXPECT_THAT(ErrorInfoMetadata(too_many),
              ElementsAre(std::pair("context_length", "64"), std::pair("max_tokens", "60"),
                          std::pair("prompt_tokens", "5")));
  stopping_.clear_max_tokens();
  EXPECT_TRUE(Admit(63).ok());
  const absl::Status too_long = Admit(64).status();
  EXPECT_EQ(FieldViolations(too_long)[0].field, "text");
  EXPECT_THAT(std::string(too_long.message()), HasSubstr("64 tokens; limit is 63"));
  EXPECT_EQ(FieldViolations(Admit(0).status())[0].description, "has no tokens");
}

TEST_F(AdmissionTest, MinTokensFitsIntoWhatIsLeft) {
  stopping_.set_min_tokens(59);
  EXPECT_TRUE(Admit(5).ok());
  stopping_.set_min_tokens(60);
  EXPECT_EQ(FieldViolations(Admit(5).status())[0].field, "stopping.min_tokens");
}

TEST_F(AdmissionTest, DefaultsComeFromTheModelAndUnsetIsNotZero) {
  model_->defaults.sampling = {.temperature = 0.5F,
                               .top_p = 0.8F,
                               .top_k = 12,
                               .min_p = 0.1F,
                               .typical_p = 0.9F,
                               .presence_penalty = 0.3F,
                               .frequency_penalty = 0.4F,
                               .repetition_penalty = 1.2F};
  const pb::SamplingParams applied = Admit()->NewStarted().sampling();
  EXPECT_FLOAT_EQ(applied.temperature(), 0.5F);
  EXPECT_FLOAT_EQ(applied.top_p(), 0.8F);
  EXPECT_EQ(applied.top_k(), 12U);
  EXPECT_FLOAT_EQ(applied.repetition_penalty(), 1.2F);
  sampling_.set_temperature(0);
  sampling_.set_top_k(0);
  EXPECT_FLOAT_EQ(Admit()->NewStarted().sampling().temperature(), 0);
  EXPECT_EQ(Admit()->NewStarted().sampling().top_k(), 0U);
  const auto* type = pb::SamplingParams::descriptor();
  for (int i = 0; i < type->field_count(); ++i) {
    if (type->field(i)->is_repeated()) continue;
    EXPECT_TRUE(applied.GetReflection()->HasField(applied, type->field(i)))
        << type->field(i)->name();
  }
}

TEST_F(AdmissionTest, WorkerRequestCarriesEverything) {
  sampling_.set_seed(std::numeric_limits<uint64_t>::max());
  sampling_.set_n(2);
  sampling_.set_top_k(kByteVocab);  // all of them
  (*sampling_.mutable_logit_bias())[3] = -7;
  stopping_.set_max_tokens(9);
  stopping_.set_min_tokens(2);
  stopping_.add_stop_token_ids(10);
  output_.set_logprobs(0);
  const auto admitted = Admit();
  const worker::v1::GenerateRequest first = admitted->WorkerRequest(0);
  EXPECT_EQ(first.seed(), std::numeric_limits<uint64_t>::max());
  EXPECT_EQ(admitted->WorkerRequest(1).seed(), 0U);  // seed + 1 wraps
  EXPECT_EQ(first.sampling().top_k(), 0U);
  EXPECT_FLOAT_EQ(first.sampling().logit_bias().at(3), -7);
  EXPECT_EQ(first.max_tokens(), 9U);
  EXPECT_EQ(first.min_tokens(), 2U);
  EXPECT_THAT(first.stop_token_ids(), ElementsAre(10, kByteEos));
  EXPECT_TRUE(first.has_logprobs());
  EXPECT_EQ(first.prompt_token_ids_size(), 5);
  EXPECT_FALSE(first.has_queue_timeout());
  EXPECT_FALSE(first.bypass_prefix_cache());
  request_.set_bypass_prefix_cache(true);
  EXPECT_TRUE(Admit()->WorkerRequest(1).bypass_prefix_cache());
}

TEST_F(AdmissionTest, IgnoreEosLeavesOnlyTheRequestsStopIds) {
  stopping_.set_ignore_eos(true);
  stopping_.add_stop_token_ids(10);
  EXPECT_THAT(Admit()->WorkerRequest(0).stop_token_ids(), ElementsAre(10));
}

TEST(AdmissionChat, ChecksTheConversation) {
  const Admission admission{Limits()};
  pb::ChatRequest request;
  auto bad_fields = [&] {
    std::vector<std::string> fields;
    for (const auto& violation : admission.CheckFields(InputOf(request, "request."), nullptr)) {
      fields.push_back(violation.field);
    }
    return fields;
  };
  EXPECT_THAT(bad_fields(), ElementsAre("request.messages"));
  request.add_messages()->set_role("user");
  EXPECT_THAT(bad_fields(), IsEmpty());
  request.add_messages()->set_role("root");
  request.add_messages()->set_role("assistant");
  request.mutable_messages(2)->set_tool_calls_json(R"([{"name": "f"}])");
  request.set_tools_json("[]");
  EXPECT_THAT(bad_fields(), ElementsAre("request.messages[1].role"));
  request.mutable_messages(2)->set_tool_calls_json("{}");
  request.set_tools_json("[1,");
  EXPECT_THAT(bad_fields(),
              ElementsAre("request.messages[1].role", "request.messages[2].tool_calls_json",
                          "request.tools_json"));
}

TEST(AdmissionChat, JsonDepthIsBounded) {
  const Admission admission{Limits()};
  pb::ChatRequest request;
  request.add_messages()->set_role("user");
  request.set_tools_json(std::string(64, '[') + std::string(64, ']'));
  EXPECT_THAT(admission.CheckFields(InputOf(request, ""), nullptr), IsEmpty());
  for (const std::string& bad :
       {std::string(65, '[') + std::string(65, ']'), std::string(500'000, '['), std::string("1"),
        std::string("\"[]\""), std::string("[] []"), std::string()}) {
    request.set_tools_json(bad);
    EXPECT_EQ(admission.CheckFields(InputOf(request, ""), nullptr).size(), 1U) << bad.substr(0, 20);
  }
}

TEST(AdmissionChat, SizeIsOfAllPartsTogether) {
  const Admission admission{Limits()};
  pb::ChatRequest request;
  for (int i = 0; i < 2; ++i) {
    auto* message = request.add_messages();
    message->set_role("user");
    message->set_content(std::string((1 << 19) - 4, 'x'));
  }
  EXPECT_THAT(admission.CheckFields(InputOf(request, ""), nullptr), IsEmpty());
  request.set_tools_json("[]");
  EXPECT_EQ(admission.CheckFields(InputOf(request, ""), nullptr)[0].field, "messages");
  request.Clear();
  for (int i = 0; i < 1025; ++i) request.add_messages()->set_role("user");
  EXPECT_EQ(admission.CheckFields(InputOf(request, ""), nullptr)[0].field, "messages");
}

}  // namespace
}  // namespace nibble::gateway
