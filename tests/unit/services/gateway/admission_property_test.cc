// Whatever a client sends, what passes the gate is within the ranges that a worker relies on.
#include <google/protobuf/descriptor.h>
#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <rapidcheck/gtest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "services/gateway/admission.h"
#include "tests/unit/services/gateway/test_model.h"

namespace nibble::gateway {
namespace {

namespace pb = inference::v1;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;

float WildFloat() {
  const auto kind = *rc::gen::inRange(0, 6);
  if (kind == 0) return std::nanf("");
  if (kind == 1) return *rc::gen::element(INFINITY, -INFINITY, -0.0F, 0.0F, 1.0F, 2.0F, -2.0F);
  if (kind == 2) {
    const auto bits = *rc::gen::arbitrary<uint32_t>();
    float value = 0;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  return static_cast<float>(*rc::gen::inRange(-3000, 12000)) / 1000;
}

uint32_t WildUint() {
  if (*rc::gen::inRange(0, 3) == 0) return *rc::gen::arbitrary<uint32_t>();
  return *rc::gen::inRange<uint32_t>(0, 70);
}

std::string WildString() {
  const auto size = *rc::gen::element<size_t>(0, 1, 2, 256, 257);
  return std::string(size, *rc::gen::element('a', '\0', '\n'));
}

void FillSingular(Message* message, const FieldDescriptor* field);

// Sets some fields, to anything their type can hold; few, so that many requests pass.
void Fill(Message* message) {
  const auto* reflection = message->GetReflection();
  for (int i = 0; i < message->GetDescriptor()->field_count(); ++i) {
    const FieldDescriptor* field = message->GetDescriptor()->field(i);
    if (*rc::gen::inRange(0, 5) != 0) continue;
    if (!field->is_repeated()) {
      FillSingular(message, field);
      continue;
    }
    const int count = *rc::gen::element(0, 1, 2, 17, 65, 301);
    for (int k = 0; k < count; ++k) {
      if (field->cpp_type() == FieldDescriptor::CPPTYPE_UINT32) {
        reflection->AddUInt32(message, field, WildUint());
      } else if (field->cpp_type() == FieldDescriptor::CPPTYPE_STRING) {
        reflection->AddString(message, field, WildString());
      } else {
        Fill(reflection->AddMessage(message, field));
      }
    }
  }
}

void FillSingular(Message* message, const FieldDescriptor* field) {
  const auto* reflection = message->GetReflection();
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_FLOAT:
      return reflection->SetFloat(message, field, WildFloat());
    case FieldDescriptor::CPPTYPE_UINT32:
      return reflection->SetUInt32(message, field, WildUint());
    case FieldDescriptor::CPPTYPE_UINT64:
      return reflection->SetUInt64(message, field, *rc::gen::arbitrary<uint64_t>());
    case FieldDescriptor::CPPTYPE_INT32:
      return reflection->SetInt32(message, field, *rc::gen::arbitrary<int32_t>());
    case FieldDescriptor::CPPTYPE_INT64:
      return reflection->SetInt64(message, field, *rc::gen::inRange<int64_t>(-5, 5000));
    case FieldDescriptor::CPPTYPE_BOOL:
      return reflection->SetBool(message, field, *rc::gen::arbitrary<bool>());
    case FieldDescriptor::CPPTYPE_STRING:
      return reflection->SetString(message, field, WildString());
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return Fill(reflection->MutableMessage(message, field));
    default:
      FAIL() << "no wild value for " << field->full_name();
  }
}

// Written down apart from the code under test: what a worker may be sent.
void CheckWorkerRequest(const worker::v1::GenerateRequest& request, const ServedModel& model) {
  const worker::v1::SamplingParams& sampling = request.sampling();
  RC_ASSERT(sampling.temperature() >= 0 && sampling.temperature() <= 100);
  RC_ASSERT(sampling.top_p() > 0 && sampling.top_p() <= 1);
  RC_ASSERT(sampling.min_p() >= 0 && sampling.min_p() <= 1);
  RC_ASSERT(sampling.typical_p() > 0 && sampling.typical_p() <= 1);
  RC_ASSERT(std::abs(sampling.presence_penalty()) <= 2);
  RC_ASSERT(std::abs(sampling.frequency_penalty()) <= 2);
  RC_ASSERT(sampling.repetition_penalty() >= 0.01F && sampling.repetition_penalty() <= 10);
  RC_ASSERT(sampling.top_k() < model.info.vocab_size());
  RC_ASSERT(sampling.logit_bias_size() <= 300);
  for (const auto& [id, bias] : sampling.logit_bias()) {
    RC_ASSERT(id < model.info.vocab_size() && std::abs(bias) <= 100);
  }
  RC_ASSERT(request.max_tokens() >= 1);
  RC_ASSERT(uint64_t{request.max_tokens()} + request.prompt_token_ids_size() <=
            model.info.context_length());
  RC_ASSERT(request.min_tokens() <= request.max_tokens());
  RC_ASSERT(request.stop_token_ids_size() <= 64 + 1);
  for (const uint32_t id : request.stop_token_ids()) RC_ASSERT(id < model.info.vocab_size());
  RC_ASSERT(!request.has_logprobs() || request.logprobs() <= 20);
  RC_ASSERT(request.queue_timeout().seconds() >= 0 && request.queue_timeout().nanos() >= 0);
}

RC_GTEST_PROP(AdmissionProperty, WhatPassesIsWithinTheWorkersRanges, ()) {
  const auto model = NewTestModel();
  const Admission admission{Limits()};
  pb::GenerateRequest request;
  Fill(&request);
  if (request.prompt_case() == pb::GenerateRequest::PROMPT_NOT_SET) request.set_text("hello");
  const GenerationInput input = InputOf(request, "");
  const auto violations = admission.CheckFields(input, model.get());
  for (const FieldViolation& violation : violations) {
    RC_ASSERT(!violation.field.empty() && !violation.description.empty());
  }
  RC_CLASSIFY(violations.empty());
  if (!violations.empty()) return;
  const auto prompt = *rc::gen::container<std::vector<int32_t>>(rc::gen::inRange(0, 256));
  const auto admitted = admission.Admit(input, model, prompt, 1);
  RC_CLASSIFY(admitted.ok(), "admitted");
  if (!admitted.ok()) return;
  RC_ASSERT(admitted->n() >= 1U && admitted->n() <= 8U);
  for (uint32_t i = 0; i < admitted->n(); ++i) {
    CheckWorkerRequest(admitted->WorkerRequest(i), *model);
  }
  RC_ASSERT(admitted->NewDecoderOptions().stops.size() <= 16U);
  for (const std::string& stop : admitted->NewDecoderOptions().stops) {
    RC_ASSERT(stop.size() >= 1U && stop.size() <= 256U);
  }
}

// One field at a time, so that most requests are refused for that field alone.
RC_GTEST_PROP(AdmissionProperty, OneBadFieldIsTheOneThatIsNamed, ()) {
  const auto model = NewTestModel();
  const Admission admission{Limits()};
  pb::GenerateRequest request;
  request.set_text("hello");
  const bool in_sampling = *rc::gen::arbitrary<bool>();
  Message* part = in_sampling ? static_cast<Message*>(request.mutable_sampling())
                              : static_cast<Message*>(request.mutable_output());
  const auto* field =
      part->GetDescriptor()->field(*rc::gen::inRange(0, part->GetDescriptor()->field_count()));
  if (field->is_repeated()) return;
  FillSingular(part, field);
  const std::string path = std::string(in_sampling ? "sampling." : "output.") + field->name();
  for (const FieldViolation& violation : admission.CheckFields(InputOf(request, ""), model.get())) {
    RC_ASSERT(violation.field == path);
  }
}

}  // namespace
}  // namespace nibble::gateway
