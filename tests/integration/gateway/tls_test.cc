// TLS on the gateway's port and towards its groups, with authorities made for the test.
#include <httplib.h>
#include <spdlog/sinks/ostream_sink.h>
#include <spdlog/spdlog.h>

#include <ctime>
#include <filesystem>
#include <fstream>
#include <optional>
#include <sstream>

#include "base/tls_source.h"
#include "gmock/gmock.h"
#include "tests/integration/gateway/gateway_fixture.h"
#include "tests/support/test_ca.h"

namespace nibble::gateway {
namespace {

using ::nibble::testing::ReplaceFile;
using ::nibble::testing::TestCa;
using ::nibble::testing::TestIdentity;
using ::testing::HasSubstr;

class TlsTest : public GatewayFixture {
 protected:
  TlsTest() {
    std::string name = ::testing::TempDir() + "/tls-XXXXXX";
    folder_ = mkdtemp(name.data());
  }
  ~TlsTest() override { std::filesystem::remove_all(folder_); }

  std::string File(const std::string& name, const std::string& contents) {
    const std::string path = folder_ + "/" + name;
    ReplaceFile(path, contents);
    return path;
  }

  TlsFiles Files(const std::string& name, const TestIdentity& identity, const std::string& ca) {
    TlsFiles files = {.certificate = File(name + ".cert", identity.certificate),
                      .key = File(name + ".key", identity.key),
                      .ca = ""};
    if (!ca.empty()) files.ca = File(name + ".ca", ca);
    return files;
  }

  // A gateway over TLS and one group in clear text.
  void StartTls(const TlsFiles& files) {
    workers_.push_back(std::make_unique<ScriptedWorker>());
    workers_.back()->Start();
    GatewayOptions options;
    options.groups = {workers_.back()->address()};
    options.tls = files;
    options.metrics_listen = "127.0.0.1:0";
    StartGateway(std::move(options));
    ASSERT_TRUE(WaitUntil([&] { return ReadyGroups() == 1; }));
  }

  static std::shared_ptr<grpc::ChannelCredentials> Client(const std::string& ca,
                                                          const TestIdentity& identity = {}) {
    grpc::SslCredentialsOptions options;
    options.pem_root_certs = ca;
    options.pem_cert_chain = identity.certificate;
    options.pem_private_key = identity.key;
    return grpc::SslCredentials(options);
  }

  // What a client of its own gets for one request.
  absl::StatusCode Ask(const std::shared_ptr<grpc::ChannelCredentials>& credentials,
                       const std::string& dialled_name = "localhost") {
    grpc::ChannelArguments arguments;
    arguments.SetString(GRPC_SSL_TARGET_NAME_OVERRIDE_ARG, dialled_name);
    stub_ = pb::InferenceService::NewStub(NewChannel(arguments, credentials));
    return Run(Request("x", 2), std::chrono::seconds(10)).status.code();
  }

  TestCa ca_;
  std::string folder_;
};

constexpr auto kOk = absl::StatusCode::kOk;
constexpr auto kNo = absl::StatusCode::kUnavailable;

TEST_F(TlsTest, ClientsSeeWhoTheyTalkTo) {
  StartTls(Files("server", ca_.Issue("server"), ""));
  EXPECT_EQ(Ask(Client(ca_.pem())), kOk);
  EXPECT_EQ(Ask(Client(TestCa().pem())), kNo);               // not by an authority of theirs
  EXPECT_EQ(Ask(Client(ca_.pem()), "elsewhere.test"), kNo);  // of another name
  EXPECT_EQ(Ask(grpc::InsecureChannelCredentials()), kNo);   // clear text
}

TEST_F(TlsTest, ClientsShowWhoTheyAreWhereAnAuthorityIsGiven) {
  TestCa clients;
  TestCa strangers;
  StartTls(Files("server", ca_.Issue("server"), clients.pem()));
  EXPECT_EQ(Ask(Client(ca_.pem(), clients.Issue("client"))), kOk);
  EXPECT_EQ(Ask(Client(ca_.pem())), kNo);
  EXPECT_EQ(Ask(Client(ca_.pem(), strangers.Issue("client"))), kNo);
  EXPECT_EQ(Ask(Client(ca_.pem(), clients.Issue("client", -7200, -3600))), kNo);  // expired
}

TEST_F(TlsTest, NewFilesAreTakenWhileStreamsGoOn) {
  TestCa next;
  const TlsFiles files = Files("server", ca_.Issue("server"), "");
  StartTls(files);
  std::atomic<bool> go_on{false};
  workers_.back()->SetScript([&](ScriptedCall* call) {
    call->Admit();
    call->SayLetters(0, 1);
    if (call->request.max_tokens() == 9 && !call->WaitFor(go_on)) return grpc::Status::CANCELLED;
    call->SayLetters(1, call->request.max_tokens());
    call->Finish(worker::v1::FINISH_REASON_LENGTH);
    return grpc::Status::OK;
  });
  grpc::ChannelArguments arguments;
  arguments.SetString(GRPC_SSL_TARGET_NAME_OVERRIDE_ARG, "localhost");
  const auto stub = pb::InferenceService::NewStub(NewChannel(arguments, Client(ca_.pem())));
  grpc::ClientContext context;
  const auto reader = stub->GenerateStream(&context, Request("x", 9));
  pb::GenerateStreamResponse response;
  Transcript transcript;
  while (transcript.tokens == 0 && reader->Read(&response)) Take(response, &transcript);

  Files("server", next.Issue("server"), "");
  EXPECT_TRUE(WaitUntil([&] { return Ask(Client(next.pem())) == kOk; }));
  EXPECT_EQ(Ask(Client(ca_.pem())), kNo);

  go_on = true;
  while (reader->Read(&response)) Take(response, &transcript);
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(transcript.text[0], LettersOf(7, 9));
}

// A set that does not hold changes nothing, and is named once.
TEST_F(TlsTest, BadFilesAreNamedAndWhatWasThereStaysInUse) {
  std::ostringstream log;
  const auto before = spdlog::default_logger();
  spdlog::set_default_logger(std::make_shared<spdlog::logger>(
      "test", std::make_shared<spdlog::sinks::ostream_sink_mt>(log)));
  spdlog::default_logger()->flush_on(spdlog::level::info);
  const TlsFiles files = Files("server", ca_.Issue("server"), "");
  StartTls(files);
  const TestIdentity other = ca_.Issue("other");
  ReplaceFile(files.key, other.key);
  // Longer than either side takes to look twice.
  std::this_thread::sleep_for(std::chrono::milliseconds(3500));
  EXPECT_EQ(Ask(Client(ca_.pem())), kOk);
  server_.reset();
  spdlog::set_default_logger(before);
  const std::string text = log.str();
  const size_t line = text.find("is not the key of tls.cert");
  ASSERT_NE(line, std::string::npos) << text;
  EXPECT_EQ(text.find("is not the key of tls.cert", line + 1), std::string::npos) << text;
}

// As an operator's alerts see it.
TEST_F(TlsTest, ReloadsAndExpiriesAreExported) {
  constexpr long kHour = 3600;
  const TlsFiles files = Files("server", ca_.Issue("server", -kHour, kHour), "");
  StartTls(files);
  const auto exported = [&](const std::string& series) -> std::optional<double> {
    const auto page = httplib::Client("http://" + server_->metrics_address()).Get("/metrics");
    if (!page) return std::nullopt;
    const size_t at = page->body.find("\n" + series + " ");
    if (at == std::string::npos) return std::nullopt;
    return std::stod(page->body.substr(at + series.size() + 2));
  };
  const std::string ok = R"(nibble_tls_reloads_total{use="listen",result="ok"})";
  const std::string failed = R"(nibble_tls_reloads_total{use="listen",result="failed"})";
  const std::string stale = R"(nibble_tls_files_stale{use="listen"})";
  const std::string expiry =
      R"(nibble_tls_expiry_timestamp_seconds{use="listen",file="certificate"})";
  const auto hours_left = [&] {
    return (exported(expiry).value_or(0) - static_cast<double>(std::time(nullptr))) / kHour;
  };
  EXPECT_EQ(exported(ok), 0);
  EXPECT_EQ(exported(failed), 0);
  EXPECT_EQ(exported(stale), 0);
  EXPECT_NEAR(hours_left(), 1, 0.1);
  EXPECT_EQ(exported(R"(nibble_tls_files_stale{use="groups"})"), std::nullopt);

  const TestIdentity next = ca_.Issue("server", -kHour, 5 * kHour);
  ReplaceFile(files.key, next.key);  // which is no pair for now
  EXPECT_TRUE(WaitUntil([&] { return exported(stale) == 1; }));
  EXPECT_EQ(exported(failed), 1);
  EXPECT_NEAR(hours_left(), 1, 0.1);
  ReplaceFile(files.certificate, next.certificate);
  EXPECT_TRUE(WaitUntil([&] { return exported(stale) == 0; }));
  EXPECT_EQ(exported(ok), 1);
  EXPECT_EQ(exported(failed), 1);
  EXPECT_NEAR(hours_left(), 5, 0.1);
}

TEST_F(TlsTest, GatewayAndGroupShowEachOtherWhoTheyAre) {
  TestCa strangers;
  const auto source =
      TlsSource::Open({.files = Files("group", ca_.Issue("group"), ca_.pem()), .names = {}});
  ASSERT_TRUE(source.ok()) << source.status();
  workers_.push_back(std::make_unique<ScriptedWorker>());
  workers_.back()->Start("127.0.0.1:0", (*source)->ServerCredentials());
  const TestIdentity gateway = ca_.Issue("gateway");
  const TestIdentity stranger = strangers.Issue("gateway");
  struct Case {
    const char* what;
    TlsFiles files;
    bool ready;
  };
  const std::vector<Case> cases = {
      {"the right certificate", Files("right", gateway, ca_.pem()), true},
      {"no certificate", {.certificate = "", .key = "", .ca = File("right.ca", ca_.pem())}, false},
      {"a stranger's certificate", Files("stranger", stranger, ca_.pem()), false},
      {"a stranger's authority", Files("wrong", gateway, strangers.pem()), false},
      {"clear text", {}, false}};
  for (const Case& one : cases) {
    GatewayOptions options;
    options.groups = {workers_.back()->address()};
    options.groups_tls = one.files;
    StartGateway(std::move(options));
    const auto patience = std::chrono::seconds(one.ready ? 10 : 1);
    EXPECT_EQ(WaitUntil([&] { return ReadyGroups() == 1; }, patience), one.ready) << one.what;
    if (one.ready) {
      EXPECT_TRUE(Run(Request("x", 3)).status.ok());
    }
    server_.reset();
  }
  workers_.back()->Stop();
}

TEST_F(TlsTest, AStartWithoutAWholeSetIsRefused) {
  TlsFiles files = Files("server", ca_.Issue("server"), "");
  const auto refusal = [](GatewayOptions options) {
    options.listen = "127.0.0.1:0";
    options.groups = {"127.0.0.1:1"};
    const auto server = GatewayServer::Start(std::move(options));
    return server.ok() ? "" : std::string(server.status().message());
  };
  GatewayOptions options;
  options.tls = {.certificate = files.certificate, .key = folder_ + "/none", .ca = ""};
  EXPECT_THAT(refusal(options), HasSubstr("tls.key"));
  // A client CA alone must not end in a port that takes everyone.
  options.tls = {.certificate = "", .key = "", .ca = files.certificate};
  EXPECT_THAT(refusal(options), HasSubstr("tls.cert is not set"));
  options.tls = {};
  options.groups_tls = files;
  EXPECT_THAT(refusal(options), HasSubstr("groups_tls.ca is not set"));
}

}  // namespace
}  // namespace nibble::gateway
