#include "tests/integration/worker/worker_process.h"

#include <fcntl.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <httplib.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

#include "base/host_port.h"

namespace nibble::testing {
namespace {

using Clock = std::chrono::steady_clock;

bool WaitFor(std::chrono::milliseconds limit, const std::function<bool()>& condition) {
  const auto until = Clock::now() + limit;
  while (!condition()) {
    if (Clock::now() >= until) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return true;
}

std::string ReadAll(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
}

std::string BinaryDir() {
  const char* dir = std::getenv("NIBBLE_BINARY_DIR");
  return std::string(dir != nullptr ? dir : "build") + "/bin";
}

// Gone, or a zombie that nobody of ours can be.
bool Gone(pid_t pid) {
  const std::string stat = ReadAll("/proc/" + std::to_string(pid) + "/stat");
  const size_t name_end = stat.rfind(')');
  return name_end == std::string::npos || stat.substr(name_end + 2, 1) == "Z";
}

bool Given(const std::vector<std::string>& flags, const std::string& flag) {
  return std::any_of(flags.begin(), flags.end(),
                     [&flag](const std::string& word) { return word.rfind(flag, 0) == 0; });
}

}  // namespace

WorkerProcess::WorkerProcess(std::vector<std::string> flags, std::vector<std::string> prefix)
    : folder_(std::filesystem::temp_directory_path() / "nibble-worker-test-XXXXXX") {
  EXPECT_NE(::mkdtemp(folder_.data()), nullptr);
  flags.push_back("--announce=" + folder_ + "/where.json");
  if (!Given(flags, "--listen=")) flags.push_back("--listen=127.0.0.1:0");
  if (!Given(flags, "--metrics-listen=")) flags.push_back("--metrics-listen=127.0.0.1:0");
  std::vector<std::string> words = std::move(prefix);
  words.push_back(BinaryDir() + "/nibble-worker");
  words.insert(words.end(), flags.begin(), flags.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);

  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, (folder_ + "/errors").c_str(),
                                     O_WRONLY | O_CREAT | O_TRUNC, 0600);
  EXPECT_EQ(::posix_spawn(&pid_, argv[0], &actions, nullptr, argv.data(), environ), 0) << argv[0];
  ::posix_spawn_file_actions_destroy(&actions);
}

WorkerProcess::~WorkerProcess() {
  Signal(SIGKILL);
  if (!exit_code_.has_value()) ::waitpid(pid_, nullptr, 0);
  EXPECT_TRUE(AwaitNobodyLeft(std::chrono::seconds(15)));
  if (::testing::Test::HasFailure()) std::fprintf(stderr, "worker said:\n%s\n", Errors().c_str());
  std::filesystem::remove_all(folder_);
}

bool WorkerProcess::AwaitServing(std::chrono::seconds limit) {
  const std::string path = folder_ + "/where.json";
  const bool announced = WaitFor(limit, [&] {
    return std::filesystem::exists(path) || AwaitExit(std::chrono::milliseconds(0)).has_value();
  });
  if (!announced || exit_code_.has_value()) {
    ADD_FAILURE() << "the worker does not serve";
    return false;
  }
  const auto json = nlohmann::json::parse(ReadAll(path));
  grpc_ = json.at("grpc");
  metrics_ = json.at("metrics");
  FindRanks();
  return true;
}

void WorkerProcess::FindRanks() {
  std::istringstream children(
      ReadAll("/proc/" + std::to_string(pid_) + "/task/" + std::to_string(pid_) + "/children"));
  ranks_.assign(std::istream_iterator<pid_t>(children), {});
  const auto rank_of = [](pid_t pid) {
    const std::string line = ReadAll("/proc/" + std::to_string(pid) + "/cmdline");
    return std::atoi(line.c_str() + line.find("--rank=") + 7);
  };
  std::sort(ranks_.begin(), ranks_.end(),
            [&rank_of](pid_t a, pid_t b) { return rank_of(a) < rank_of(b); });
}

worker::v1::WorkerService::Stub& WorkerProcess::stub() {
  if (stub_ == nullptr) {
    stub_ = worker::v1::WorkerService::NewStub(
        grpc::CreateChannel(grpc_, grpc::InsecureChannelCredentials()));
  }
  return *stub_;
}

void WorkerProcess::Signal(int signal) const {
  if (!exit_code_.has_value() && pid_ > 0) ::kill(pid_, signal);
}

std::optional<int> WorkerProcess::AwaitExit(std::chrono::milliseconds limit) {
  int status = 0;
  if (exit_code_.has_value()) return exit_code_;
  if (!WaitFor(limit, [&] { return ::waitpid(pid_, &status, WNOHANG) == pid_; })) {
    return std::nullopt;
  }
  exit_code_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return exit_code_;
}

bool WorkerProcess::AwaitNobodyLeft(std::chrono::milliseconds limit) {
  return WaitFor(limit,
                 [this] { return Gone(pid_) && std::all_of(ranks_.begin(), ranks_.end(), Gone); });
}

std::string WorkerProcess::Errors() const { return ReadAll(folder_ + "/errors"); }

std::string WorkerProcess::Get(const std::string& path, int* status) const {
  const auto where = ParseHostPort(metrics_);
  if (!where.ok()) return "";
  const auto answer = httplib::Client(where->host, where->port).Get(path);
  if (!answer) return "";
  if (status != nullptr) *status = answer->status;
  return answer->body;
}

double WorkerProcess::Metric(const std::string& name_and_labels) const {
  std::istringstream text(Get("/metrics"));
  for (std::string line; std::getline(text, line);) {
    if (line.rfind(name_and_labels + " ", 0) == 0) {
      return std::atof(line.c_str() + name_and_labels.size());
    }
  }
  return std::nan("");
}

worker::v1::GenerateRequest GreedyRequest(const std::vector<int32_t>& prompt, int32_t max_tokens) {
  worker::v1::GenerateRequest request;
  for (const int32_t id : prompt) request.add_prompt_token_ids(static_cast<uint32_t>(id));
  worker::v1::SamplingParams* sampling = request.mutable_sampling();
  sampling->set_temperature(0);
  sampling->set_top_p(1);
  sampling->set_typical_p(1);
  sampling->set_repetition_penalty(1);
  request.set_max_tokens(static_cast<uint32_t>(max_tokens));
  return request;
}

StreamResult Generate(worker::v1::WorkerService::Stub* stub,
                      const worker::v1::GenerateRequest& request) {
  StreamResult result;
  grpc::ClientContext context;
  const auto stream = stub->Generate(&context, request);
  worker::v1::GenerateResponse response;
  while (stream->Read(&response)) {
    const auto& ids = response.tokens().ids();
    result.ids.insert(result.ids.end(), ids.begin(), ids.end());
    if (response.has_finished()) result.finished = response.finished();
  }
  result.status = stream->Finish();
  return result;
}

}  // namespace nibble::testing
