// What a client gets when everything goes well: events, texts, stops, choices, usage.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "tests/integration/gateway/gateway_fixture.h"

namespace nibble::gateway {
namespace {

namespace wire = worker::v1;
using ::testing::ElementsAre;

using GenerateTest = GatewayFixture;

TEST_F(GenerateTest, StreamsEveryTokenInOrder) {
  StartWith(1);
  pb::GenerateStreamRequest request = Request("hello", 40);
  request.mutable_request()->set_request_id("my-id");
  request.mutable_request()->mutable_output()->set_token_ids(true);
  const Transcript got = Run(request);
  ASSERT_TRUE(got.status.ok()) << got.status;
  EXPECT_EQ(got.text.at(0), LettersOf(7, 40));
  ASSERT_EQ(got.ids.at(0).size(), 40U);
  for (uint32_t i = 0; i < 40; ++i) {
    EXPECT_EQ(got.ids.at(0)[i], static_cast<uint32_t>(LetterOf(7, i)));
  }
  EXPECT_EQ(got.tokens, 40U);
  ASSERT_TRUE(got.started.has_value());
  EXPECT_EQ(got.started->seed(), 7U);
  EXPECT_EQ(got.started->prompt_tokens(), 6U);  // BOS and five bytes
  EXPECT_EQ(got.started->max_tokens(), 40U);
  EXPECT_EQ(got.started->model(), "m");
  EXPECT_FLOAT_EQ(got.started->sampling().temperature(), 0.5F);  // generation_config.json
  const pb::Finished& finished = got.finished.at(0);
  EXPECT_EQ(finished.reason(), pb::FINISH_REASON_LENGTH);
  EXPECT_EQ(finished.usage().prompt_tokens(), 6U);
  EXPECT_EQ(finished.usage().completion_tokens(), 40U);
  EXPECT_EQ(finished.usage().cached_prompt_tokens(), 1U);
  EXPECT_EQ(finished.worker(), "g0");
  EXPECT_EQ(finished.timings().queue().nanos(), 1000);
  EXPECT_GT(finished.timings().time_to_first_token().nanos(), 0);
  EXPECT_EQ(got.trailers.at("x-tokens-sent"), "40");
  EXPECT_EQ(got.trailers.at("x-group"), "g0");
  EXPECT_EQ(got.trailers.at("x-request-id"), "my-id");
}

TEST_F(GenerateTest, UnaryIsTheWholeAnswer) {
  StartWith(1);
  pb::GenerateResponse response;
  const Transcript got = RunUnary(Request("hello", 30).request(), &response);
  ASSERT_TRUE(got.status.ok()) << got.status;
  ASSERT_EQ(response.choices_size(), 1);
  EXPECT_EQ(response.choices(0).text(), LettersOf(7, 30));
  EXPECT_EQ(response.choices(0).reason(), pb::FINISH_REASON_LENGTH);
  EXPECT_EQ(response.usage().completion_tokens(), 30U);
  EXPECT_EQ(response.seed(), 7U);
  EXPECT_EQ(response.max_tokens(), 30U);
  EXPECT_EQ(response.model(), "m");
  EXPECT_FALSE(response.request_id().empty());
}

TEST_F(GenerateTest, DrawsAndEchoesASeed) {
  StartWith(1);
  pb::GenerateStreamRequest request = Request("hello", 5);
  request.mutable_request()->mutable_sampling()->clear_seed();
  const Transcript first = Run(request);
  const Transcript second = Run(request);
  EXPECT_NE(first.started->seed(), second.started->seed());
  EXPECT_EQ(first.text.at(0), LettersOf(first.started->seed(), 5));
}

TEST_F(GenerateTest, ChoicesHaveSeedsOfTheirOwn) {
  StartWith(1);
  pb::GenerateStreamRequest request = Request("hello", 20);
  request.mutable_request()->mutable_sampling()->set_n(3);
  const Transcript got = Run(request);
  ASSERT_TRUE(got.status.ok()) << got.status;
  uint32_t prompt_tokens = 0;
  for (uint32_t i = 0; i < 3; ++i) {
    EXPECT_EQ(got.text.at(i), LettersOf(7 + i, 20));
    EXPECT_EQ(got.finished.at(i).usage().completion_tokens(), 20U);
    prompt_tokens += got.finished.at(i).usage().prompt_tokens();
  }
  EXPECT_EQ(prompt_tokens, 6U);
  EXPECT_EQ(got.trailers.at("x-tokens-sent"), "60");
}

TEST_F(GenerateTest, StopStringEndsOneChoiceAndLeavesTheOthers) {
  StartWith(1);
  workers_[0]->SetScript([](ScriptedCall* call) {
    call->Admit();
    if (call->request.seed() == 7) {  // choice 0
      call->Say("one EN");
      call->Say("D two");
      EXPECT_TRUE(call->WaitForCancel());
      return grpc::Status::OK;
    }
    call->SayLetters(0, call->request.max_tokens());
    call->Finish(wire::FINISH_REASON_LENGTH);
    return grpc::Status::OK;
  });
  pb::GenerateStreamRequest request = Request("hello", 60);
  request.mutable_request()->mutable_sampling()->set_n(2);
  request.mutable_request()->mutable_stopping()->add_stop("END");
  const Transcript got = Run(request);
  ASSERT_TRUE(got.status.ok()) << got.status;
  EXPECT_EQ(got.text.at(0), "one ");
  EXPECT_EQ(got.finished.at(0).reason(), pb::FINISH_REASON_STOP_STRING);
  EXPECT_EQ(got.finished.at(0).stop_string(), "END");
  EXPECT_EQ(got.finished.at(0).usage().completion_tokens(), 7U);
  EXPECT_EQ(got.text.at(1), LettersOf(8, 60));
  EXPECT_EQ(got.finished.at(1).reason(), pb::FINISH_REASON_LENGTH);
  EXPECT_TRUE(WaitUntil([&] { return workers_[0]->cancelled() == 1; }));
}

TEST_F(GenerateTest, EosAndStopIdsAreToldApart) {
  StartWith(1);
  workers_[0]->SetScript([](ScriptedCall* call) {
    call->Admit();
    call->Say("hi");
    call->SayIds({call->request.seed() == 7 ? uint32_t{kByteEos} : uint32_t{'!'}});
    call->Finish(wire::FINISH_REASON_STOP);
    return grpc::Status::OK;
  });
  pb::GenerateStreamRequest request = Request("hello", 20, 7);
  request.mutable_request()->mutable_stopping()->add_stop_token_ids('!');
  const Transcript eos = Run(request);
  EXPECT_EQ(eos.text.at(0), "hi");
  EXPECT_EQ(eos.finished.at(0).reason(), pb::FINISH_REASON_EOS);
  EXPECT_EQ(eos.finished.at(0).stop_token_id(), 257U);
  request.mutable_request()->mutable_sampling()->set_seed(8);
  const Transcript stop = Run(request);
  EXPECT_EQ(stop.text.at(0), "hi");
  EXPECT_EQ(stop.finished.at(0).reason(), pb::FINISH_REASON_STOP);
  EXPECT_EQ(stop.finished.at(0).stop_token_id(), static_cast<uint32_t>('!'));
  EXPECT_THAT(workers_[0]->requests()[0].stop_token_ids(), ElementsAre('!', kByteEos));
}

TEST_F(GenerateTest, CharactersAreNeverCut) {
  StartWith(1);
  workers_[0]->SetScript([](ScriptedCall* call) {
    call->Admit();
    for (const char c : std::string("\u00e9\u20ac\U0001F600")) call->Say(std::string(1, c));
    call->Say("\xE2");  // cut by max_tokens
    call->Finish(wire::FINISH_REASON_LENGTH);
    return grpc::Status::OK;
  });
  const Transcript got = Run(Request("hello", 10));
  ASSERT_TRUE(got.status.ok()) << got.status;  // protobuf refuses strings that are not UTF-8
  EXPECT_EQ(got.text.at(0), "\u00e9\u20ac\U0001F600\uFFFD");
}

TEST_F(GenerateTest, LogprobsAndIdsComeWhereAskedFor) {
  StartWith(1);
  pb::GenerateRequest request = Request("hello", 3).request();
  request.mutable_output()->set_logprobs(2);
  request.mutable_output()->set_text(false);
  request.mutable_output()->set_token_ids(true);
  pb::GenerateResponse response;
  ASSERT_TRUE(RunUnary(request, &response).status.ok());
  EXPECT_EQ(response.choices(0).text(), "");
  EXPECT_EQ(response.choices(0).token_ids_size(), 3);
  ASSERT_EQ(response.choices(0).logprobs_size(), 3);
  EXPECT_EQ(response.choices(0).logprobs(1).top_size(), 2);
  EXPECT_EQ(response.choices(0).logprobs(1).sampled().token(), std::string(1, LetterOf(7, 1)));
}

TEST_F(GenerateTest, ChatGoesThroughTheTemplate) {
  StartWith(1);
  pb::ChatRequest request;
  auto* message = request.add_messages();
  message->set_role("user");
  message->set_content("hi");
  request.mutable_stopping()->set_max_tokens(4);
  pb::ChatResponse response;
  grpc::ClientContext context;
  const grpc::Status status = stub_->Chat(&context, request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(response.choices(0).text().size(), 4U);
  std::string prompt;
  const auto asked = workers_[0]->requests()[0];
  for (int i = 1; i < asked.prompt_token_ids_size(); ++i) {
    prompt += static_cast<char>(asked.prompt_token_ids(i));
  }
  EXPECT_EQ(asked.prompt_token_ids(0), static_cast<uint32_t>(kByteBos));
  EXPECT_EQ(prompt, "user:hi;assistant:");
}

TEST_F(GenerateTest, ChatStreamsToo) {
  StartWith(1);
  pb::ChatStreamRequest request;
  auto* message = request.mutable_request()->add_messages();
  message->set_role("user");
  message->set_content("hi");
  request.mutable_request()->mutable_stopping()->set_max_tokens(4);
  request.mutable_request()->mutable_sampling()->set_seed(3);
  grpc::ClientContext context;
  auto reader = stub_->ChatStream(&context, request);
  pb::ChatStreamResponse response;
  std::string text;
  while (reader->Read(&response)) text += response.delta().text();
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(text, LettersOf(3, 4));
}

TEST_F(GenerateTest, BosIsNeverTwice) {
  StartWith(1);
  ASSERT_TRUE(Run(Request("<s>hi", 1)).status.ok());
  EXPECT_THAT(workers_[0]->requests()[0].prompt_token_ids(), ElementsAre(kByteBos, 'h', 'i'));
}

TEST_F(GenerateTest, TokenIdsGoAsTheyAre) {
  StartWith(1);
  pb::GenerateStreamRequest request = Request("", 1);
  request.mutable_request()->mutable_token_ids()->add_ids('x');
  ASSERT_TRUE(Run(request).status.ok());
  EXPECT_THAT(workers_[0]->requests()[0].prompt_token_ids(), ElementsAre('x'));
}

TEST_F(GenerateTest, MaxTokensUnsetIsToTheEndOfTheContext) {
  StartWith(1);
  pb::GenerateStreamRequest request = Request("hello", 1);
  request.mutable_request()->mutable_stopping()->clear_max_tokens();
  const Transcript got = Run(request);
  EXPECT_EQ(got.started->max_tokens(), 512U - 6U);
  EXPECT_EQ(got.finished.at(0).usage().completion_tokens(), 512U - 6U);
}

TEST_F(GenerateTest, TokenizeShowsWhatGenerateSends) {
  StartWith(1);
  pb::TokenizeRequest request;
  request.set_text(std::string("a\0b", 3));
  pb::TokenizeResponse response;
  {
    grpc::ClientContext context;
    ASSERT_TRUE(stub_->Tokenize(&context, request, &response).ok());
    EXPECT_THAT(response.token_ids(), ElementsAre(kByteBos, 'a', 0, 'b'));
    EXPECT_FALSE(response.has_rendered());
  }
  request.set_add_special_tokens(false);
  {
    grpc::ClientContext context;
    ASSERT_TRUE(stub_->Tokenize(&context, request, &response).ok());
    EXPECT_EQ(response.token_ids_size(), 3);
  }
  auto* message = request.mutable_chat()->add_messages();
  message->set_role("user");
  message->set_content("x");
  request.mutable_chat()->set_add_generation_prompt(false);
  grpc::ClientContext context;
  ASSERT_TRUE(stub_->Tokenize(&context, request, &response).ok());
  EXPECT_EQ(response.rendered(), "user:x;");
}

TEST_F(GenerateTest, DetokenizeGivesTheText) {
  StartWith(1);
  pb::DetokenizeRequest request;
  for (const uint32_t id : {256, 0x68, 0x69, 257}) request.add_token_ids(id);
  pb::DetokenizeResponse response;
  {
    grpc::ClientContext context;
    ASSERT_TRUE(stub_->Detokenize(&context, request, &response).ok());
    EXPECT_EQ(response.text(), "hi");
  }
  request.set_skip_special_tokens(false);
  {
    grpc::ClientContext context;
    ASSERT_TRUE(stub_->Detokenize(&context, request, &response).ok());
    EXPECT_EQ(response.text(), "<s>hi</s>");
  }
  request.add_token_ids(258);
  grpc::ClientContext context;
  const grpc::Status status = stub_->Detokenize(&context, request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(GenerateTest, ModelsSayWhatTheyAre) {
  StartWith(2);
  pb::ListModelsResponse list;
  {
    grpc::ClientContext context;
    ASSERT_TRUE(model_stub_->ListModels(&context, {}, &list).ok());
  }
  ASSERT_EQ(list.models_size(), 1);
  const pb::Model& model = list.models(0);
  EXPECT_EQ(model.name(), "m");
  EXPECT_EQ(model.state(), pb::MODEL_STATE_READY);
  EXPECT_EQ(model.groups_ready(), 2U);
  EXPECT_EQ(model.context_length(), 512U);
  EXPECT_EQ(model.vocab_size(), 258U);
  EXPECT_EQ(model.quantization(), "awq gemm g64");
  EXPECT_EQ(model.tensor_parallel(), 2U);
  EXPECT_TRUE(model.chat());
  EXPECT_FLOAT_EQ(model.default_sampling().temperature(), 0.5F);
  pb::GetModelRequest request;
  request.set_name("m");
  pb::GetModelResponse one;
  {
    grpc::ClientContext context;
    ASSERT_TRUE(model_stub_->GetModel(&context, request, &one).ok());
    EXPECT_EQ(one.model().SerializeAsString(), model.SerializeAsString());
  }
  request.set_name("x");
  grpc::ClientContext context;
  EXPECT_EQ(model_stub_->GetModel(&context, request, &one).error_code(),
            grpc::StatusCode::NOT_FOUND);
}

}  // namespace
}  // namespace nibble::gateway
