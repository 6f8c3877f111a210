// docs/OPERATIONS.md lists exactly the metrics that the programs export.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <httplib.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <regex>
#include <set>
#include <sstream>
#include <string>

#include "base/api_keys.h"
#include "nibble/inference/v1/inference.grpc.pb.h"
#include "tests/support/program.h"
#include "tests/support/test_ca.h"
#include "tests/support/test_data.h"

namespace nibble::gateway {
namespace {

using testing::Program;
using testing::WaitFor;
using Labels = std::set<std::string>;
using Metrics = std::map<std::string, Labels>;  // by name

std::string ReadAll(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// The rows of the table below the heading that begins with `heading`.
Metrics Documented(const std::string& heading) {
  std::istringstream page(ReadAll(testing::SourceDir() + "/docs/OPERATIONS.md"));
  static const std::regex kName("`((?:nibble|grpc)_[a-z_]+)(?:\\{([a-z_,]+)\\})?`");
  Metrics metrics;
  bool inside = false;
  for (std::string line; std::getline(page, line);) {
    if (line.starts_with('#')) inside = line.starts_with(heading);
    if (!inside || !line.starts_with("| `")) continue;
    const std::string cell = line.substr(0, line.find('|', 1));
    for (std::sregex_iterator i(cell.begin(), cell.end(), kName), end; i != end; ++i) {
      Labels& labels = metrics[(*i)[1]];
      std::istringstream list((*i)[2]);
      for (std::string label; std::getline(list, label, ',');) labels.insert(label);
    }
  }
  return metrics;
}

// What /metrics says, families by their TYPE lines with the labels of their series.
Metrics Exported(const std::string& address) {
  const auto answer = httplib::Client("http://" + address).Get("/metrics");
  Metrics metrics;
  if (!answer) return metrics;
  static const std::regex kLabel("([a-z_]+)=\"");
  std::istringstream text(answer->body);
  std::string family;
  for (std::string line; std::getline(text, line);) {
    if (line.starts_with("# TYPE ")) {
      family = line.substr(7, line.find(' ', 7) - 7);
      metrics[family];
    } else if (!line.starts_with('#')) {
      for (std::sregex_iterator i(line.begin(), line.end(), kLabel), end; i != end; ++i) {
        if ((*i)[1] != "le") metrics[family].insert((*i)[1]);
      }
    }
  }
  return metrics;
}

void ExpectSame(const Metrics& documented, const Metrics& exported) {
  EXPECT_FALSE(documented.empty());
  for (const auto& [name, labels] : documented) {
    const auto found = exported.find(name);
    if (found == exported.end()) {
      ADD_FAILURE() << name << " is documented and not exported";
      continue;
    }
    EXPECT_THAT(found->second, ::testing::IsSupersetOf(labels)) << name;
  }
  for (const auto& [name, labels] : exported) {
    EXPECT_TRUE(documented.contains(name)) << name << " is exported and not documented";
  }
}

// The fake worker exports the group's metrics through the same code as the real one.
TEST(DocumentedMetrics, AreWhatTheProgramsExport) {
  const std::string folder = ::testing::TempDir() + "documented_metrics_model";
  std::filesystem::create_directories(folder);
  std::filesystem::copy_file(testing::SourceDir() + "/tests/data/text/byte-level-tokenizer.json",
                             folder + "/tokenizer.json",
                             std::filesystem::copy_options::overwrite_existing);
  // Series of TLS files come with them.
  testing::TestCa ca;
  const testing::TestIdentity identity = ca.Issue("both");
  for (const auto& [name, text] :
       {std::pair("ca.pem", ca.pem()), std::pair("cert.pem", identity.certificate),
        std::pair("key.pem", identity.key)}) {
    testing::ReplaceFile(folder + "/" + name, text);
  }
  const std::string certificate = "--tls-cert=" + folder + "/cert.pem";
  const std::string key = "--tls-key=" + folder + "/key.pem";
  Program worker("fake_worker", {"--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0",
                                 "--tokenizer=" + folder, certificate, key});
  ASSERT_TRUE(worker.AwaitAddresses()) << worker.Errors();
  // Series of tenants come with the keys file.
  std::ofstream(folder + "/keys.toml")
      << "[keys]\na = { tenant = \"t\", sha256 = \"" << HexOf(HashOf("nbl_key")) << "\" }\n";
  Program gateway("nibble-gateway",
                  {"--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0",
                   "--groups=" + worker.Address("grpc"), "--groups-tls-ca=" + folder + "/ca.pem",
                   certificate, key, "--keys-file=" + folder + "/keys.toml"});
  ASSERT_TRUE(gateway.AwaitAddresses()) << gateway.Errors();
  const auto stub = inference::v1::InferenceService::NewStub(grpc::CreateChannel(
      gateway.Address("grpc"),
      grpc::SslCredentials(
          {.pem_root_certs = ca.pem(), .pem_private_key = "", .pem_cert_chain = ""})));
  // Series of models and statuses appear with the first request that has them.
  EXPECT_TRUE(WaitFor(std::chrono::seconds(20), [&] {
    grpc::ClientContext context;
    context.AddMetadata("authorization", "Bearer nbl_key");
    inference::v1::GenerateRequest request;
    request.set_text("hello");
    request.mutable_stopping()->set_max_tokens(3);
    inference::v1::GenerateResponse response;
    return stub->Generate(&context, request, &response).ok();
  })) << gateway.Errors();
  ExpectSame(Documented("### Worker group"), Exported(worker.Address("metrics")));
  ExpectSame(Documented("### Gateway"), Exported(gateway.Address("metrics")));
}

}  // namespace
}  // namespace nibble::gateway
