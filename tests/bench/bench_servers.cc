#include "tests/bench/bench_servers.h"

#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <thread>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "tests/support/test_data.h"

namespace nibble::bench {

using testing::Program;

BenchServers StartBenchServers(const std::vector<std::string>& leader_flags,
                               const std::vector<std::string>& gateway_flags) {
  const std::string folder =
      std::filesystem::temp_directory_path() / absl::StrCat("nibble-bench-", ::getpid());
  std::filesystem::create_directories(folder);
  std::filesystem::copy_file(testing::SourceDir() + "/tests/data/text/byte-level-tokenizer.json",
                             folder + "/tokenizer.json",
                             std::filesystem::copy_options::overwrite_existing);
  std::vector<std::string> leader = {"--listen=127.0.0.1:0", "--tokenizer=" + folder,
                                     absl::StrCat("--vocab-size=", kBenchVocab)};
  leader.insert(leader.end(), leader_flags.begin(), leader_flags.end());
  BenchServers servers;
  servers.leader = std::make_unique<Program>("fake_worker", leader);
  CHECK_MSG(servers.leader->AwaitAddresses(), servers.leader->Errors());
  std::vector<std::string> gateway = {"--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0",
                                      "--groups=" + servers.leader->Address("grpc")};
  gateway.insert(gateway.end(), gateway_flags.begin(), gateway_flags.end());
  servers.gateway = std::make_unique<Program>("nibble-gateway", gateway);
  CHECK_MSG(servers.gateway->AwaitAddresses(), servers.gateway->Errors());
  std::this_thread::sleep_for(std::chrono::seconds(2));  // until the group has been taken up
  std::filesystem::remove_all(folder);
  return servers;
}

}  // namespace nibble::bench
