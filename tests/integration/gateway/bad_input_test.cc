// Whatever bytes come in, a status goes out and the gateway goes on.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "tests/integration/gateway/gateway_fixture.h"
#include "tests/support/raw_client.h"

namespace nibble::gateway {
namespace {

using absl::StatusCode;
using ::testing::AnyOf;
using ::testing::ElementsAre;

constexpr char kGenerate[] = "/nibble.inference.v1.InferenceService/Generate";
constexpr char kGenerateStream[] = "/nibble.inference.v1.InferenceService/GenerateStream";
constexpr char kChat[] = "/nibble.inference.v1.InferenceService/Chat";
constexpr char kTokenize[] = "/nibble.inference.v1.InferenceService/Tokenize";

class BadInputTest : public GatewayFixture {
 protected:
  void SetUp() override { StartWith(1); }
  void TearDown() override {
    // The proof that it went on.
    const Transcript got = Run(Request("hello", 5));
    EXPECT_TRUE(got.status.ok()) << got.status;
    GatewayFixture::TearDown();
  }
  static std::vector<std::string> BadFields(const absl::Status& status) {
    std::vector<std::string> fields;
    for (const auto& violation : FieldViolations(status)) fields.push_back(violation.field);
    return fields;
  }
};

TEST_F(BadInputTest, HugePromptsAreRefusedFast) {
  for (const size_t megabytes : {5, 100}) {
    const pb::GenerateStreamRequest request = Request(std::string(megabytes << 20, 'x'), 5);
    const auto begin = std::chrono::steady_clock::now();
    const Transcript got = Run(request);
    EXPECT_EQ(got.status.code(), StatusCode::kResourceExhausted) << got.status;
    EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(5));
  }
  // Within the message limit, beyond the prompt's own.
  const Transcript got = Run(Request(std::string(2 << 20, 'x'), 5));
  EXPECT_EQ(got.status.code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(BadFields(got.status), ElementsAre("request.text"));
}

TEST_F(BadInputTest, CompressedBombIsRefused) {
  pb::GenerateRequest request;
  request.set_text(std::string(64 << 20, 'x'));
  const Transcript got =
      RunBytes(kGenerate, request.SerializeAsString(), nullptr, GRPC_COMPRESS_GZIP);
  EXPECT_THAT(got.status.code(), AnyOf(StatusCode::kResourceExhausted, StatusCode::kUnimplemented))
      << got.status;
}

TEST_F(BadInputTest, InvalidUtf8NamesItsField) {
  const std::string bytes = "\x1a\x04zz\xff\xfe";  // text
  for (const char* method : {kGenerate}) {
    const Transcript got = RunBytes(method, bytes);
    EXPECT_EQ(got.status.code(), StatusCode::kInvalidArgument) << got.status;
    EXPECT_THAT(BadFields(got.status), ElementsAre("text"));
  }
  const std::string wrapped = "\x0a\x06" + bytes;  // request.text
  const Transcript stream = RunBytes(kGenerateStream, wrapped);
  EXPECT_EQ(stream.status.code(), StatusCode::kInvalidArgument) << stream.status;
  EXPECT_THAT(BadFields(stream.status), ElementsAre("request.text"));
  const std::string chat =
      "\x1a\x05\x12\x03"
      "a\xc3(";  // messages[0].content
  EXPECT_THAT(BadFields(RunBytes(kChat, chat).status), ElementsAre("messages[0].content"));
  EXPECT_THAT(BadFields(RunBytes(kTokenize, "\x12\x01\x80").status), ElementsAre("text"));
}

TEST_F(BadInputTest, GarbageIsInvalid) {
  for (const std::string& bytes :
       {std::string("\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), std::string("\x1a\x7f short"),
        std::string(1000, '\xff'), std::string("\x0b\x0b\x0b")}) {
    for (const char* method : {kGenerate, kGenerateStream, kChat, kTokenize}) {
      EXPECT_EQ(RunBytes(method, bytes).status.code(), StatusCode::kInvalidArgument);
    }
  }
  // An empty message is well-formed and has no prompt.
  EXPECT_THAT(BadFields(RunBytes(kGenerate, "").status), ElementsAre("prompt"));
}

TEST_F(BadInputTest, NulBytesAreText) {
  const Transcript got = Run(Request(std::string("a\0b", 3), 5));
  EXPECT_TRUE(got.status.ok()) << got.status;
  EXPECT_THAT(workers_[0]->requests()[0].prompt_token_ids(), ElementsAre(kByteBos, 'a', 0, 'b'));
}

TEST_F(BadInputTest, EmptyPromptsNameTheirFields) {
  pb::GenerateStreamRequest request = Request("", 5);
  EXPECT_THAT(BadFields(Run(request).status), ElementsAre("request.text"));
  request.mutable_request()->mutable_token_ids();
  EXPECT_THAT(BadFields(Run(request).status), ElementsAre("request.token_ids.ids"));
  request.mutable_request()->clear_prompt();
  EXPECT_THAT(BadFields(Run(request).status), ElementsAre("request.prompt"));
  EXPECT_THAT(BadFields(RunBytes(kChat, "").status), ElementsAre("messages"));
}

TEST_F(BadInputTest, HugeCountsNameTheirFields) {
  constexpr uint32_t kHuge = 0xFFFFFFFF;
  pb::GenerateStreamRequest request = Request("hello", kHuge);
  pb::GenerateRequest& inner = *request.mutable_request();
  inner.mutable_sampling()->set_n(kHuge);
  inner.mutable_output()->set_logprobs(kHuge);
  inner.mutable_stopping()->set_min_tokens(kHuge);
  for (uint32_t i = 0; i < 100'000; ++i) {
    inner.mutable_stopping()->add_stop_token_ids(i);
    (*inner.mutable_sampling()->mutable_logit_bias())[i] = 1;
  }
  const Transcript got = Run(request);
  EXPECT_EQ(got.status.code(), StatusCode::kInvalidArgument) << got.status;
  EXPECT_THAT(
      BadFields(got.status),
      ::testing::IsSupersetOf({"request.sampling.n", "request.output.logprobs",
                               "request.stopping.stop_token_ids", "request.sampling.logit_bias"}));
  EXPECT_TRUE(workers_[0]->requests().empty());
}

TEST_F(BadInputTest, UnknownFieldsAreIgnored) {
  pb::GenerateRequest request = Request("hello", 5).request();
  std::string reply;
  const Transcript got = RunBytes(
      kGenerate, request.SerializeAsString() + "\xa2\x1f\x02\xff\xfe" + "\x98\x06\x01", &reply);
  EXPECT_TRUE(got.status.ok()) << got.status;
  pb::GenerateResponse response;
  ASSERT_TRUE(response.ParseFromString(reply));
  EXPECT_EQ(response.choices(0).text(), LettersOf(7, 5));
}

// Up to the transport's own limit it costs the call alone: others on its connection go on.
TEST_F(BadInputTest, TooMuchMetadataIsRefused) {
  workers_[0]->SetScript([](ScriptedCall* call) {
    call->Admit();
    EXPECT_TRUE(call->WaitForCancel());
    return grpc::Status::OK;
  });
  grpc::ClientContext beside;
  auto reader = stub_->GenerateStream(&beside, Request("hello", 5));
  pb::GenerateStreamResponse event;
  ASSERT_TRUE(reader->Read(&event));
  for (const size_t kilobytes : {9, 14}) {
    grpc::ClientContext context;
    context.AddMetadata("x-junk", std::string(kilobytes << 10, 'x'));
    pb::GenerateResponse response;
    const absl::Status status =
        FromGrpcStatus(stub_->Generate(&context, Request("hello", 5).request(), &response));
    EXPECT_EQ(status.code(), StatusCode::kResourceExhausted) << status;
    EXPECT_EQ(ErrorReason(status), "OVERLOADED");
  }
  EXPECT_EQ(workers_[0]->requests().size(), 1U);
  beside.TryCancel();
  while (reader->Read(&event)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  workers_[0]->SetScript(SpeakLetters());
}

// gRPC ends the connection then, before or after the status has got through: the call fails either
// way, and so may the next one on that connection. Other connections never notice.
TEST_F(BadInputTest, MetadataPastTheTransportsLimitEndsItsConnectionOnly) {
  for (const size_t kilobytes : {17, 64, 1024}) {
    const auto other = pb::InferenceService::NewStub(NewChannel());
    grpc::ClientContext context;
    context.AddMetadata("x-junk", std::string(kilobytes << 10, 'x'));
    pb::GenerateResponse response;
    EXPECT_FALSE(other->Generate(&context, Request("hello", 5).request(), &response).ok());
    EXPECT_TRUE(Run(Request("hello", 5)).status.ok());
  }
  EXPECT_EQ(workers_[0]->requests().size(), 3U);
}

// The encoded headers of a call pass their bound at about 32 KiB and go on for ever. The connection
// is closed there: within 20 ms (of five tries), before the rest is read, and with nothing kept.
TEST_F(BadInputTest, HeadersWithoutAnEndAreCutWhereTheyPassTheirBound) {
  const auto headers = [](const std::string& block) {
    return nibble::testing::Http2Frame(1, 0, 1, block);
  };
  const auto continuation = [](const std::string& block) {
    return nibble::testing::Http2Frame(9, 0, 1, block);
  };
  constexpr size_t kBytes = 64 << 20;  // far more than two sockets hold
  constexpr std::chrono::milliseconds kCut{20};
  const std::string begin =
      std::string("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n") + nibble::testing::Http2Frame(4, 0, 0, "");
  const std::string name("\x00\x06x-junk", 8);  // a literal, its value to follow
  std::string small;
  for (int i = 0; i < 4000; ++i)
    small += std::string(
        "\x00\x01"
        "a"
        "\x00",
        4);
  const std::string huge(16 << 10, 'x');
  for (const auto& [first, next] :
       {std::pair(headers(name + "\x7f\xff\xff\xff\x07"), continuation(huge)),  // one of 16 MiB
        std::pair(headers(""), continuation(small)),                            // ever more of them
        std::pair(headers(""), continuation(""))}) {  // frames without any
    auto quickest = std::chrono::steady_clock::duration::max();
    for (int i = 0; i < 5 && quickest > kCut; ++i) {
      const auto cut = nibble::testing::SendRaw(server_->address(), begin + first, next, kBytes);
      ASSERT_TRUE(cut.closed);
      ASSERT_LT(cut.sent, kBytes);
      quickest = std::min(quickest, cut.took);
    }
    EXPECT_LE(quickest, kCut);
  }
}

TEST_F(BadInputTest, UnknownMethodIsUnimplemented) {
  EXPECT_EQ(RunBytes("/nibble.inference.v1.InferenceService/Nothing", "").status.code(),
            StatusCode::kUnimplemented);
}

// Bits flipped in good requests: anything but a crash or a hang.
TEST_F(BadInputTest, FlippedBitsEndInAStatus) {
  pb::GenerateRequest request = Request("hello", 3).request();
  request.mutable_sampling()->set_n(2);
  request.mutable_sampling()->set_temperature(0.5F);
  request.mutable_stopping()->add_stop("END");
  request.mutable_output()->set_logprobs(1);
  const std::string bytes = request.SerializeAsString();
  for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    std::string flipped = bytes;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << (bit % 8)));
    const Transcript got = RunBytes(kGenerate, flipped);
    EXPECT_THAT(got.status.code(),
                AnyOf(StatusCode::kOk, StatusCode::kInvalidArgument, StatusCode::kNotFound))
        << bit << " " << got.status;
  }
}

}  // namespace
}  // namespace nibble::gateway
