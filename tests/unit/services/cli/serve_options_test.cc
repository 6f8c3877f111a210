#include "services/cli/serve_options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/config.h"

namespace nibble::cli {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

ConfigOutcome Parse(const std::vector<std::string>& args, ServeOptions* options) {
  ConfigParser parser({.name = "nibble serve", .summary = "s", .example = "e"});
  DeclareServeOptions(&parser, options);
  return parser.Parse(args, [](const char*) { return nullptr; });
}

const ServePaths kPaths = {.programs = "/opt/nibble", .scratch = "/tmp/nibble-x"};

TEST(ServeOptions, ReachTheWorker) {
  ServeOptions options;
  ASSERT_EQ(
      Parse({".", "--tp", "3", "--numerics", "exact", "--head", "stored", "--memory", "2GiB",
             "--context", "1024", "--threads", "1", "--model-name", "m", "--prefix-cache", "off"},
            &options)
          .error,
      "");
  const auto line = WorkerCommandLine(options, kPaths);
  EXPECT_EQ(line.front(), "/opt/nibble/nibble-worker");
  for (const char* word :
       {"--model=.", "--tp=3", "--device=cpu", "--numerics=exact", "--head=stored",
        "--memory=2147483648", "--prefix-cache=off", "--context=1024", "--threads=1",
        "--model-name=m", "--listen=unix:/tmp/nibble-x/worker.sock",
        "--metrics-listen=127.0.0.1:9110"}) {
    EXPECT_THAT(line, Contains(word));
  }
}

TEST(ServeOptions, WhatOnlyGpusHaveReachesTheWorkerWithThem) {
  ServeOptions options;
  ASSERT_EQ(Parse({".", "--device", "cuda", "--fusion", "off", "--memory-fraction", "0.5",
                   "--activations", "bf16"},
                  &options)
                .error,
            "");
  const auto line = WorkerCommandLine(options, kPaths);
  for (const char* word :
       {"--device=cuda", "--fusion=off", "--memory-fraction=0.5", "--activations=bf16"}) {
    EXPECT_THAT(line, Contains(word));
  }
  EXPECT_EQ(CheckServeOptions(options).ok(), CheckDevice("cuda").ok());
}

TEST(ServeOptions, LeaveToTheWorkerWhatIsNotGiven) {
  ServeOptions options;
  ASSERT_EQ(Parse({"."}, &options).error, "");
  const auto line = WorkerCommandLine(options, kPaths);
  for (const char* flag : {"--memory", "--context", "--threads", "--model-name", "--kv-blocks",
                           "--fusion", "--memory-fraction", "--activations"}) {
    EXPECT_THAT(line, Not(Contains(StartsWith(flag))));
  }
}

TEST(ServeOptions, ReachTheGateway) {
  ServeOptions options;
  ASSERT_EQ(Parse({".", "--port", "0", "--drain-timeout", "5s", "--tls-cert", "c.pem",
                   "--keys-file", "k.toml"},
                  &options)
                .error,
            "");
  const auto line = GatewayCommandLine(options, kPaths);
  EXPECT_EQ(line.front(), "/opt/nibble/nibble-gateway");
  for (const char* word :
       {"--listen=127.0.0.1:0", "--groups=unix:/tmp/nibble-x/worker.sock", "--drain-timeout=5s",
        "--sampling-defaults=model", "--tls-cert=c.pem", "--keys-file=k.toml"}) {
    EXPECT_THAT(line, Contains(word));
  }
  EXPECT_THAT(line, Not(Contains(StartsWith("--admin-listen"))));
  EXPECT_THAT(line, Not(Contains(StartsWith("--tls-client-ca"))));
}

TEST(ServeOptions, AFolderThatDoesNotExistIsRefusedByName) {
  ServeOptions options;
  const ConfigOutcome outcome = Parse({"/nowhere/at/all"}, &options);
  EXPECT_EQ(outcome.exit_code, 2);
  EXPECT_THAT(outcome.error,
              HasSubstr("model is \"/nowhere/at/all\" (from --model); allowed: a folder"));
}

TEST(ServeOptions, AClientAuthorityWithoutACertificateIsRefused) {
  ServeOptions options;
  options.tls.ca = "ca.pem";
  EXPECT_THAT(std::string(CheckServeOptions(options).message()), HasSubstr("tls.cert is not set"));
}

TEST(ServeOptions, AddressesAreCheckedByName) {
  ServeOptions options;
  EXPECT_TRUE(CheckServeOptions(options).ok());
  options.metrics_listen = "9100";
  EXPECT_THAT(std::string(CheckServeOptions(options).message()),
              HasSubstr("metrics_listen is \"9100\"; allowed: host:port"));
}

}  // namespace
}  // namespace nibble::cli
