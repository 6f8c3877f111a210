#include "base/metrics_server.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <httplib.h>
#include <prometheus/counter.h>
#include <prometheus/registry.h>

#include <atomic>

#include "base/host_port.h"
#include "tests/support/raw_client.h"

namespace nibble {
namespace {

httplib::Result Get(const MetricsServer& server, const char* path) {
  const auto where = ParseHostPort(server.address());
  return httplib::Client(where->host, where->port).Get(path);
}

TEST(MetricsServer, ExportsEveryRegistryInTextForm) {
  auto first = std::make_shared<prometheus::Registry>();
  auto second = std::make_shared<prometheus::Registry>();
  prometheus::BuildCounter()
      .Name("nibble_eggs_total")
      .Help("Eggs.")
      .Register(*first)
      .Add({{"kind", "brown"}})
      .Increment(3);
  prometheus::BuildCounter().Name("nibble_hens_total").Help("Hens.").Register(*second).Add({});
  const auto server =
      MetricsServer::Start({.address = "127.0.0.1:0", .collectables = {first, second}});
  ASSERT_TRUE(server.ok()) << server.status();

  const auto answer = Get(**server, "/metrics");
  ASSERT_TRUE(answer);
  EXPECT_EQ(answer->status, 200);
  EXPECT_THAT(answer->get_header_value("Content-Type"),
              ::testing::HasSubstr("text/plain; version=0.0.4"));
  EXPECT_THAT(answer->body, ::testing::HasSubstr("# TYPE nibble_eggs_total counter\n"
                                                 "nibble_eggs_total{kind=\"brown\"} 3"));
  EXPECT_THAT(answer->body, ::testing::HasSubstr("nibble_hens_total 0"));
}

TEST(MetricsServer, ProbesSayWhyNot) {
  std::atomic<bool> ready{false};
  const auto server = MetricsServer::Start(
      {.address = "127.0.0.1:0", .ready = [&ready] {
         return ready ? absl::OkStatus() : absl::UnavailableError("the model is loading");
       }});
  ASSERT_TRUE(server.ok()) << server.status();
  EXPECT_EQ(Get(**server, "/healthz")->status, 200);
  const auto before = Get(**server, "/readyz");
  EXPECT_EQ(before->status, 503);
  EXPECT_EQ(before->body, "the model is loading\n");
  ready = true;
  EXPECT_EQ(Get(**server, "/readyz")->status, 200);
  EXPECT_EQ(Get(**server, "/else")->status, 404);
}

TEST(MetricsServer, ShowsPeopleAPageThatNeedsNothingElse) {
  const auto server = MetricsServer::Start({.address = "127.0.0.1:0"});
  ASSERT_TRUE(server.ok()) << server.status();
  const auto page = Get(**server, "/");
  ASSERT_TRUE(page);
  EXPECT_EQ(page->status, 200);
  EXPECT_EQ(page->get_header_value("Content-Type"), "text/html; charset=utf-8");
  EXPECT_THAT(page->body, ::testing::StartsWith("<!doctype html>"));
  EXPECT_THAT(page->body, ::testing::EndsWith("</html>\n"));
  EXPECT_THAT(page->body, ::testing::HasSubstr("default-src 'none'"));
}

// Whatever has no end is cut where it passes the bound, and nothing of it is kept.
TEST(MetricsServer, RequestsWithoutAnEndAreCut) {
  const auto server = MetricsServer::Start({.address = "127.0.0.1:0"});
  ASSERT_TRUE(server.ok()) << server.status();
  constexpr size_t kBytes = 256 << 20;  // far more than two sockets hold
  const std::string line(16 << 10, 'x');
  const std::string field = "X-Junk: y\r\n";
  const std::string request = "GET /healthz HTTP/1.1\r\nHost: x\r\n";
  std::string fields;
  for (int i = 0; i < 2000; ++i) fields += field;
  for (const auto& [begin, again] :
       {std::pair(std::string("GET /"), line), std::pair(request + "X-Junk: ", line),
        std::pair(request, fields), std::pair("POST" + request.substr(3) + "\r\n", line),
        std::pair(request + "Content-Length: 999999999\r\n\r\n", line)}) {
    SCOPED_TRACE(begin);
    const auto [sent, got, closed, took] =
        testing::SendRaw((*server)->address(), begin, again, kBytes);
    EXPECT_TRUE(closed);
    EXPECT_LT(sent, kBytes);
  }
  // Where nothing is in the way of the answer it is read.
  const auto [sent, got, closed, took] = testing::SendRaw(
      (*server)->address(), request + fields.substr(0, (16 << 10) + 1 - request.size()), "", 0);
  EXPECT_TRUE(closed);
  EXPECT_THAT(got, ::testing::StartsWith("HTTP/1.1 431 "));
  EXPECT_EQ(Get(**server, "/healthz")->status, 200);
}

// Two seconds are for the whole request, not for each of its bytes.
TEST(MetricsServer, ARequestThatComesByteByByteIsCut) {
  const auto server = MetricsServer::Start({.address = "127.0.0.1:0"});
  ASSERT_TRUE(server.ok()) << server.status();
  const auto cut = testing::Drip((*server)->address(), "G", std::chrono::milliseconds(100));
  EXPECT_TRUE(cut.closed);
  EXPECT_GT(cut.took, std::chrono::seconds(1));
  EXPECT_LT(cut.took, std::chrono::seconds(6));
}

TEST(MetricsServer, RefusesAPortThatIsTaken) {
  const auto first = MetricsServer::Start({.address = "127.0.0.1:0"});
  ASSERT_TRUE(first.ok());
  const auto second = MetricsServer::Start({.address = (*first)->address()});
  EXPECT_EQ(second.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(second.status().message()), ::testing::HasSubstr((*first)->address()));
}

TEST(MetricsServer, RefusesAnAddressThatDoesNotParse) {
  EXPECT_EQ(MetricsServer::Start({.address = "nine"}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace nibble
