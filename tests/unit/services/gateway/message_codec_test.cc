#include "services/gateway/message_codec.h"

#include <gmock/gmock.h>
#include <google/protobuf/stubs/logging.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "base/grpc_status.h"
#include "nibble/inference/v1/inference.pb.h"

namespace nibble::gateway {
namespace {

namespace pb = inference::v1;
using ::testing::ElementsAre;

class MessageCodec : public ::testing::Test {
 protected:
  void SetUp() override { previous_ = google::protobuf::SetLogHandler(nullptr); }
  void TearDown() override { google::protobuf::SetLogHandler(previous_); }

  // In two slices, as a transport may hand it over.
  static grpc::ByteBuffer Bytes(const std::string& bytes) {
    const size_t half = bytes.size() / 2;
    const std::vector<grpc::Slice> slices = {grpc::Slice(bytes.substr(0, half)),
                                             grpc::Slice(bytes.substr(half))};
    return grpc::ByteBuffer(slices.data(), slices.size());
  }
  static std::vector<std::string> BadFields(const absl::Status& status) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    std::vector<std::string> fields;
    for (const FieldViolation& violation : FieldViolations(status)) {
      fields.push_back(violation.field);
    }
    return fields;
  }

 private:
  google::protobuf::LogHandler* previous_ = nullptr;
};

TEST_F(MessageCodec, RoundTripKeepsEverything) {
  pb::GenerateRequest request;
  request.set_text(std::string("a\0\u00e9", 4));
  request.mutable_sampling()->set_top_p(0);
  pb::GenerateRequest back;
  ASSERT_TRUE(ParseMessage(SerializeMessage(request), &back).ok());
  EXPECT_EQ(back.SerializeAsString(), request.SerializeAsString());
  ASSERT_TRUE(ParseMessage(SerializeMessage(pb::GenerateRequest()), &back).ok());
  EXPECT_EQ(back.ByteSizeLong(), 0U);
}

TEST_F(MessageCodec, NamesEveryStringThatIsNotUtf8) {
  pb::ChatStreamRequest request;
  request.mutable_request()->add_messages()->set_content("fine");
  request.mutable_request()->add_messages()->set_content("zzzz");
  request.mutable_request()->mutable_stopping()->add_stop("\u00e9");
  request.mutable_request()->set_model("yyyy");
  std::string bytes = request.SerializeAsString();
  bytes.replace(bytes.find("zzzz"), 4, "z\xffzz");
  bytes.replace(bytes.find("yyyy"), 4, "yy\xed\xa0");
  pb::ChatStreamRequest parsed;
  EXPECT_THAT(BadFields(ParseMessage(Bytes(bytes), &parsed)),
              ElementsAre("request.model", "request.messages[1].content"));
}

TEST_F(MessageCodec, RefusesEveryFormOfBadUtf8) {
  for (const char* const bad :
       {"\x80", "\xc0\x80", "\xc1\xbf", "\xe0\x80\x80", "\xed\xa0\x80", "\xf0\x80\x80\x80",
        "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xc3", "\xe2\x82", "a\xff"}) {
    pb::GenerateRequest request;
    std::string bytes = "\x1a";  // field 3, text
    bytes += static_cast<char>(std::string(bad).size());
    bytes += bad;
    EXPECT_THAT(BadFields(ParseMessage(Bytes(bytes), &request)), ElementsAre("text")) << bad;
  }
}

TEST_F(MessageCodec, GarbageIsToldApart) {
  pb::GenerateRequest request;
  EXPECT_THAT(BadFields(ParseMessage(Bytes("\x1a\x7f short"), &request)), ElementsAre("request"));
  EXPECT_THAT(
      BadFields(ParseMessage(Bytes("\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), &request)),
      ElementsAre("request"));
}

TEST_F(MessageCodec, UnknownFieldsAreIgnored) {
  pb::GenerateRequest request;
  // Field 500 (length-delimited, not UTF-8), then text = "hi".
  const std::string bytes = std::string("\xa2\x1f\x02\xff\xfe") + "\x1a\x02hi";
  ASSERT_TRUE(ParseMessage(Bytes(bytes), &request).ok());
  EXPECT_EQ(request.text(), "hi");
}

}  // namespace
}  // namespace nibble::gateway
