#include "worker/rpc/request_validation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>

#include "base/grpc_status.h"

namespace nibble::rpc {
namespace {

using worker::v1::GenerateRequest;

constexpr RequestLimits kLimits{.vocab_size = 1000, .max_context = 64};

GenerateRequest Valid() {
  GenerateRequest request;
  request.set_request_id("r-1");
  request.add_prompt_token_ids(5);
  request.add_prompt_token_ids(999);
  worker::v1::SamplingParams* sampling = request.mutable_sampling();
  sampling->set_temperature(0.7f);
  sampling->set_top_p(0.9f);
  sampling->set_top_k(40);
  sampling->set_min_p(0.05f);
  sampling->set_typical_p(1);
  sampling->set_presence_penalty(-2);
  sampling->set_frequency_penalty(2);
  sampling->set_repetition_penalty(1.1f);
  (*sampling->mutable_logit_bias())[7] = -100;
  (*sampling->mutable_logit_bias())[3] = 100;
  request.set_seed(std::numeric_limits<uint64_t>::max());
  request.set_max_tokens(62);
  request.set_min_tokens(2);
  request.add_stop_token_ids(2);
  request.set_logprobs(20);
  request.mutable_queue_timeout()->set_seconds(3);
  request.mutable_queue_timeout()->set_nanos(500);
  return request;
}

absl::StatusOr<engine::Request> Convert(const GenerateRequest& request) {
  ManualClock clock;
  clock.Advance(std::chrono::seconds(100));
  return ToEngineRequest(request, kLimits, Deadline(std::chrono::seconds(500)), clock);
}

TEST(RequestValidation, CarriesEveryFieldOver) {
  const auto request = Convert(Valid());
  ASSERT_TRUE(request.ok()) << request.status();
  EXPECT_THAT(request->prompt, testing::ElementsAre(5, 999));
  EXPECT_FLOAT_EQ(request->sampling.temperature, 0.7f);
  EXPECT_FLOAT_EQ(request->sampling.top_p, 0.9f);
  EXPECT_EQ(request->sampling.top_k, 40);
  EXPECT_FLOAT_EQ(request->sampling.min_p, 0.05f);
  EXPECT_FLOAT_EQ(request->sampling.typical_p, 1);
  EXPECT_FLOAT_EQ(request->sampling.presence_penalty, -2);
  EXPECT_FLOAT_EQ(request->sampling.frequency_penalty, 2);
  EXPECT_FLOAT_EQ(request->sampling.repetition_penalty, 1.1f);
  ASSERT_EQ(request->sampling.logit_bias.size(), 2u);
  EXPECT_EQ(request->sampling.logit_bias[0].token_id, 3);  // sorted, whatever the map does
  EXPECT_EQ(request->sampling.logit_bias[0].bias, 100);
  EXPECT_EQ(request->sampling.logit_bias[1].token_id, 7);
  EXPECT_EQ(request->seed, std::numeric_limits<uint64_t>::max());
  EXPECT_EQ(request->max_tokens, 62);
  EXPECT_EQ(request->min_tokens, 2);
  EXPECT_THAT(request->stop_ids, testing::ElementsAre(2));
  EXPECT_EQ(request->logprobs, 20);
  EXPECT_EQ(request->deadline, Deadline(std::chrono::seconds(500)));
  EXPECT_EQ(request->queue_deadline,
            Deadline(std::chrono::seconds(103) + std::chrono::nanoseconds(500)));
}

TEST(RequestValidation, FillsInWhatMayBeUnset) {
  GenerateRequest request = Valid();
  request.clear_logprobs();
  request.clear_queue_timeout();
  request.mutable_sampling()->set_top_k(1000);
  const auto converted = Convert(request);
  ASSERT_TRUE(converted.ok()) << converted.status();
  EXPECT_EQ(converted->logprobs, -1);
  EXPECT_EQ(converted->queue_deadline, Deadline(std::chrono::seconds(110)));
  EXPECT_EQ(converted->sampling.top_k, 0);  // the whole vocabulary is no limit
}

TEST(RequestValidation, HandsOnWhosePrefixesItMayTake) {
  GenerateRequest request = Valid();
  request.set_prefix_salt(std::string("s\0t", 3));
  auto converted = Convert(request);
  ASSERT_TRUE(converted.ok()) << converted.status();
  EXPECT_EQ(converted->prefix_salt, std::string("s\0t", 3));
  EXPECT_FALSE(converted->bypass_prefix_cache);
  request.set_bypass_prefix_cache(true);
  converted = Convert(request);
  ASSERT_TRUE(converted.ok()) << converted.status();
  EXPECT_TRUE(converted->bypass_prefix_cache);
}

TEST(RequestValidation, HandsOnWhoAsksAndHowUrgentItIs) {
  GenerateRequest request = Valid();
  auto converted = Convert(request);
  ASSERT_TRUE(converted.ok()) << converted.status();
  EXPECT_EQ(converted->tenant, "");
  EXPECT_EQ(converted->priority, Priority::kNormal);
  request.set_tenant("acme-2_B");
  for (const auto& [wire, priority] : std::initializer_list<std::pair<int, Priority>>{
           {worker::v1::PRIORITY_LOW, Priority::kLow},
           {worker::v1::PRIORITY_NORMAL, Priority::kNormal},
           {worker::v1::PRIORITY_HIGH, Priority::kHigh},
           {17, Priority::kNormal}}) {  // of a newer gateway
    request.set_priority(static_cast<worker::v1::Priority>(wire));
    converted = Convert(request);
    ASSERT_TRUE(converted.ok()) << converted.status();
    EXPECT_EQ(converted->tenant, "acme-2_B");
    EXPECT_EQ(converted->priority, priority) << wire;
  }
}

// Whoever adds a field adds it to the tests here, then to this list.
TEST(RequestValidation, EveryFieldOfTheContractIsKnownHere) {
  const auto names = [](const google::protobuf::Descriptor* message) {
    std::vector<std::string> found;
    for (int i = 0; i < message->field_count(); ++i) found.push_back(message->field(i)->name());
    return found;
  };
  EXPECT_THAT(names(GenerateRequest::descriptor()),
              testing::UnorderedElementsAre("request_id", "prompt_token_ids", "sampling", "seed",
                                            "max_tokens", "min_tokens", "stop_token_ids",
                                            "logprobs", "queue_timeout", "tenant", "priority",
                                            "prefix_salt", "bypass_prefix_cache"));
  EXPECT_THAT(names(worker::v1::SamplingParams::descriptor()),
              testing::UnorderedElementsAre("temperature", "top_p", "top_k", "min_p", "typical_p",
                                            "presence_penalty", "frequency_penalty",
                                            "repetition_penalty", "logit_bias"));
}

struct BadField {
  std::string field;
  std::function<void(GenerateRequest*)> spoil;
};

std::vector<BadField> BadFields() {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  std::vector<BadField> bad = {
      {"request_id", [](auto* r) { r->set_request_id(std::string(129, 'x')); }},
      {"request_id", [](auto* r) { r->set_request_id("two\nlines"); }},
      {"request_id", [](auto* r) { r->set_request_id(std::string("nul\0", 4)); }},
      {"prompt_token_ids", [](auto* r) { r->clear_prompt_token_ids(); }},
      {"prompt_token_ids", [](auto* r) { r->set_prompt_token_ids(1, 1000); }},
      {"prompt_token_ids", [](auto* r) { r->set_prompt_token_ids(0, 0xffffffff); }},
      {"sampling", [](auto* r) { r->clear_sampling(); }},
      {"sampling.logit_bias",
       [](auto* r) { (*r->mutable_sampling()->mutable_logit_bias())[1000] = 1; }},
      {"sampling.logit_bias",
       [](auto* r) { (*r->mutable_sampling()->mutable_logit_bias())[0xffffffff] = 1; }},
      {"sampling.logit_bias",
       [](auto* r) { (*r->mutable_sampling()->mutable_logit_bias())[1] = 100.5f; }},
      {"sampling.logit_bias",
       [](auto* r) { (*r->mutable_sampling()->mutable_logit_bias())[1] = kNan; }},
      {"sampling.logit_bias",
       [](auto* r) {
         for (uint32_t i = 0; i < 301; ++i) (*r->mutable_sampling()->mutable_logit_bias())[i] = 1;
       }},
      {"max_tokens", [](auto* r) { r->set_max_tokens(0), r->set_min_tokens(0); }},
      {"max_tokens", [](auto* r) { r->set_max_tokens(0x80000000); }},
      {"max_tokens", [](auto* r) { r->set_max_tokens(0xffffffff); }},
      {"min_tokens", [](auto* r) { r->set_min_tokens(63); }},
      {"min_tokens", [](auto* r) { r->set_min_tokens(0xffffffff); }},
      {"stop_token_ids", [](auto* r) { r->add_stop_token_ids(1000); }},
      {"stop_token_ids",
       [](auto* r) {
         for (uint32_t i = 0; i < 256; ++i) r->add_stop_token_ids(i);
       }},
      {"logprobs", [](auto* r) { r->set_logprobs(21); }},
      {"logprobs", [](auto* r) { r->set_logprobs(0xffffffff); }},
      {"tenant", [](auto* r) { r->set_tenant(std::string(65, 'x')); }},
      {"tenant", [](auto* r) { r->set_tenant("two words"); }},
      {"tenant", [](auto* r) { r->set_tenant("a\nb"); }},
      {"tenant", [](auto* r) { r->set_tenant("gr\xc3\xbc\xc3\x9f"); }},
      {"prefix_salt", [](auto* r) { r->set_prefix_salt(std::string(33, 's')); }},
      {"queue_timeout", [](auto* r) { r->mutable_queue_timeout()->set_seconds(-1); }},
      {"queue_timeout", [](auto* r) { r->mutable_queue_timeout()->set_seconds(3601); }},
      {"queue_timeout", [](auto* r) { r->mutable_queue_timeout()->set_nanos(-1); }},
      {"queue_timeout", [](auto* r) { r->mutable_queue_timeout()->set_nanos(1'000'000'000); }},
  };
  using Sampling = worker::v1::SamplingParams;
  const auto add = [&bad](const char* name, void (Sampling::*set)(float),
                          std::initializer_list<float> values) {
    for (const float value : values) {
      bad.push_back({std::string("sampling.") + name,
                     [set, value](auto* r) { (r->mutable_sampling()->*set)(value); }});
    }
  };
  add("temperature", &Sampling::set_temperature, {-0.1f, 100.5f, kNan, kInfinity, -kInfinity});
  add("top_p", &Sampling::set_top_p, {0, -1, 1.01f, kNan, kInfinity});
  add("min_p", &Sampling::set_min_p, {-0.01f, 1.01f, kNan});
  add("typical_p", &Sampling::set_typical_p, {0, -0.5f, 1.01f, kNan});
  add("presence_penalty", &Sampling::set_presence_penalty, {-2.01f, 2.01f, kNan});
  add("frequency_penalty", &Sampling::set_frequency_penalty, {-2.01f, 2.01f, kNan});
  add("repetition_penalty", &Sampling::set_repetition_penalty, {0, -1, 101, kNan, kInfinity});
  return bad;
}

TEST(RequestValidation, NamesTheFieldThatIsOutOfRange) {
  for (const BadField& bad : BadFields()) {
    GenerateRequest request = Valid();
    bad.spoil(&request);
    const auto converted = Convert(request);
    ASSERT_EQ(converted.status().code(), absl::StatusCode::kInvalidArgument)
        << bad.field << " " << request.ShortDebugString();
    const auto violations = FieldViolations(converted.status());
    ASSERT_EQ(violations.size(), 1u) << converted.status();
    EXPECT_EQ(violations[0].field, bad.field);
    EXPECT_EQ(ErrorReason(converted.status()), reason::kInvalidParameter);
  }
}

TEST(RequestValidation, NamesEveryBadFieldAtOnce) {
  GenerateRequest request = Valid();
  request.clear_prompt_token_ids();
  request.mutable_sampling()->set_top_p(0);
  request.mutable_sampling()->set_temperature(-1);
  request.set_logprobs(99);
  const auto violations = FieldViolations(Convert(request).status());
  std::vector<std::string> fields;
  for (const auto& violation : violations) fields.push_back(violation.field);
  EXPECT_THAT(fields, testing::UnorderedElementsAre("prompt_token_ids", "sampling.top_p",
                                                    "sampling.temperature", "logprobs"));
}

TEST(RequestValidation, RefusesWhatDoesNotFitTheContext) {
  GenerateRequest request = Valid();
  request.set_max_tokens(63);  // with two prompt tokens one too many
  const absl::Status status = Convert(request).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ErrorReason(status), reason::kContextLengthExceeded);
  EXPECT_THAT(ErrorInfoMetadata(status), testing::Contains(testing::Pair("context_length", "64")));
  request.set_max_tokens(0x7fffffff);  // and no overflow on the way
  EXPECT_EQ(ErrorReason(Convert(request).status()), reason::kContextLengthExceeded);
}

}  // namespace
}  // namespace nibble::rpc
