// A leader without a model: the real gRPC edge and the real engine over an executor whose token i
// of a request with seed s is FakeToken(s, i). For tests of the gateway and for load tests.

#include <sys/signalfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/announce.h"
#include "base/config.h"
#include "base/exit_codes.h"
#include "base/logging.h"
#include "base/metrics_server.h"
#include "base/status.h"
#include "base/tls_metrics.h"
#include "base/tls_options.h"
#include "tests/support/fake_executor.h"
#include "worker/group/group_metrics.h"
#include "worker/leader_loop.h"
#include "worker/rpc/leader.h"

namespace nibble {
namespace {

struct Options {
  std::string listen = "127.0.0.1:0";
  std::string metrics_listen;
  std::string announce;
  std::string model_name = "fake";
  std::string tokenizer;  // a folder; empty = no files
  std::string log_level = "warn";
  int32_t vocab_size = 1000;
  int32_t context = 4096;
  int32_t max_sequences = 64;
  int32_t max_step_tokens = 512;
  int32_t kv_blocks = 4096;
  int32_t queue_size = 128;
  Duration step_base = std::chrono::milliseconds(1);
  Duration step_per_token{};
  Duration step_deadline = std::chrono::seconds(10);
  Duration drain_timeout = std::chrono::seconds(60);
  int64_t launch_error_at = 0;
  int64_t wait_error_at = 0;
  int64_t hang_at = 0;
  bool check_history = false;
  TlsFiles tls;
};

void Declare(ConfigParser* parser, Options* options) {
  constexpr int32_t kMax = 1 << 30;
  parser->String("listen", &options->listen, "host:port or unix:PATH");
  parser->String("metrics_listen", &options->metrics_listen, "host:port; empty = off");
  parser->String("announce", &options->announce, "File to write the addresses to");
  parser->String("model_name", &options->model_name, "Name of the model");
  parser->String("tokenizer", &options->tokenizer, "Folder with the files GetTokenizer sends");
  parser->String("log.level", &options->log_level, "trace, debug, info, warn, error, off");
  parser->Int("vocab_size", &options->vocab_size, {2, kMax}, "Tokens in the vocabulary");
  parser->Int("context", &options->context, {2, kMax}, "Positions of one sequence");
  parser->Int("max_sequences", &options->max_sequences, {1, kMax}, "Slots");
  parser->Int("max_step_tokens", &options->max_step_tokens, {1, kMax}, "Tokens of one step");
  parser->Int("kv_blocks", &options->kv_blocks, {1, kMax}, "KV blocks");
  parser->Int("queue_size", &options->queue_size, {1, kMax}, "Requests that may wait");
  parser->Time("step_base", &options->step_base, {.min = Duration::zero()}, "Time of a step");
  parser->Time("step_per_token", &options->step_per_token, {.min = Duration::zero()},
               "Time of a step per token of it");
  parser->Time("step_deadline", &options->step_deadline, {.min = Duration(1)},
               "A step that takes longer ends the worker");
  parser->Time("drain_timeout", &options->drain_timeout, {.min = Duration::zero()},
               "After SIGTERM, what runs may take this long");
  parser->Int("launch_error_at", &options->launch_error_at, {0}, "Step whose launch fails");
  parser->Int("wait_error_at", &options->wait_error_at, {0}, "Step that fails");
  parser->Int("hang_at", &options->hang_at, {0}, "Step that never ends");
  parser->Bool("check_history", &options->check_history, "Check all earlier positions of a row");
  DeclareServerTlsOptions(parser, &options->tls);
}

rpc::TokenizerFiles ReadTokenizerFiles(const std::string& folder) {
  rpc::TokenizerFiles::Files files;
  if (folder.empty()) return rpc::TokenizerFiles({});
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                           "config.json", "generation_config.json"}) {
    std::ifstream file(folder + "/" + name, std::ios::binary);
    if (!file) continue;
    files.emplace_back(name, std::string((std::istreambuf_iterator<char>(file)),
                                         std::istreambuf_iterator<char>()));
  }
  return rpc::TokenizerFiles(std::move(files));
}

testing::FakeExecutorOptions ExecutorOptions(const Options& options, const Clock* clock) {
  testing::FakeExecutorOptions executor;
  executor.limits = {.vocab_size = options.vocab_size,
                     .max_context = options.context,
                     .max_slots = options.max_sequences,
                     .max_step_tokens = options.max_step_tokens,
                     .kv_blocks = options.kv_blocks};
  executor.step_base = options.step_base;
  executor.step_per_token = options.step_per_token;
  executor.clock = clock;
  executor.sleep_until = [](Deadline until) { std::this_thread::sleep_until(until); };
  executor.check_whole_history = options.check_history;
  return executor;
}

worker::v1::GetModelInfoResponse ModelInfo(const Options& options) {
  worker::v1::GetModelInfoResponse info;
  info.set_model(options.model_name);
  info.set_architecture("FakeForCausalLM");
  info.set_quantization("none");
  info.set_context_length(static_cast<uint32_t>(options.context));
  info.set_vocab_size(static_cast<uint32_t>(options.vocab_size));
  info.set_tensor_parallel(1);
  info.set_model_hash("fake");
  info.set_max_sequences(static_cast<uint32_t>(options.max_sequences));
  info.set_kv_blocks(static_cast<uint32_t>(options.kv_blocks));
  info.set_block_tokens(step::kBlockTokens);
  info.set_queue_size(static_cast<uint32_t>(options.queue_size));
  return info;
}

// SIGTERM drains, a second one aborts; as in the real worker.
int MakeSignalFd() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  ::pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  return ::signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
}

absl::Status Serve(const Options& options, int signal_fd) {
  const SteadyClock clock;
  const auto stats = std::make_unique<step::GroupStats>();
  const rpc::TokenizerFiles files = ReadTokenizerFiles(options.tokenizer);
  testing::FakeExecutor executor(ExecutorOptions(options, &clock),
                                 {.launch_error_at = static_cast<uint64_t>(options.launch_error_at),
                                  .wait_error_at = static_cast<uint64_t>(options.wait_error_at),
                                  .hang_at = static_cast<uint64_t>(options.hang_at)});

  rpc::LeaderOptions leader_options;
  leader_options.engine = {
      .queue_size = options.queue_size,
      .prefill_chunk_tokens = options.max_step_tokens,
      // A step takes as long as it is told to, whatever is in it.
      .prefill_chunk_time = std::max<Duration>(std::chrono::seconds(1), 20 * options.step_base),
      .step_deadline = options.step_deadline,
      .prefix_cache = false};  // nor what was asked before: load tests ask the same again and again
  leader_options.executor = &executor;
  leader_options.clock = &clock;
  leader_options.stats = &stats->engine;
  ASSIGN_OR_RETURN(leader_options.server.listen, rpc::ParseListenAddress(options.listen));
  leader_options.server.tls = options.tls;
  leader_options.server.tls_stats = &stats->listen_tls;
  leader_options.server.service.tokenizer_files = &files;
  leader_options.server.service.model_info = ModelInfo(options);
  leader_options.server.service.limits = {.vocab_size = options.vocab_size,
                                          .max_context = options.context};
  ASSIGN_OR_RETURN(const auto leader, rpc::Leader::Start(std::move(leader_options)));

  std::unique_ptr<MetricsServer> metrics;
  if (!options.metrics_listen.empty()) {
    stats->ranks[0].up.Set(1);
    ASSIGN_OR_RETURN(
        metrics,
        MetricsServer::Start(
            {.address = options.metrics_listen,
             .collectables = {std::make_shared<group::GroupMetrics>(
                                  &*stats, &clock,
                                  group::GroupFacts{.model = options.model_name, .device = "fake"}),
                              std::make_shared<TlsMetrics>(std::vector<TlsMetrics::Use>{
                                  {.label = "listen", .stats = &stats->listen_tls}})}}));
  }
  if (!options.announce.empty()) {
    RETURN_IF_ERROR(WriteAnnouncement(
        options.announce,
        {{"grpc", leader->address()}, {"metrics", metrics == nullptr ? "" : metrics->address()}}));
  }
  std::printf("%s\n", leader->address().c_str());
  std::fflush(stdout);
  return worker::RunLeaderLoop(
      leader.get(),
      {.command_fd = signal_fd,
       .next_command = [signal_fd, signals = 0]() mutable -> std::optional<group::Command> {
         signalfd_siginfo info{};
         if (::read(signal_fd, &info, sizeof(info)) <= 0) return std::nullopt;
         return signals++ == 0 ? group::Command::kDrain : group::Command::kAbort;
       },
       .drain_timeout = options.drain_timeout,
       .clock = &clock});
}

int Main(int argc, char** argv) {
  Options options;
  ConfigParser parser({.name = "fake_worker",
                       .summary = "A leader whose tokens are hashes of seed and index.",
                       .example = "fake_worker --listen 127.0.0.1:0 --announce fake.json"});
  Declare(&parser, &options);
  if (const auto exit_code = parser.ParseMain(argc, argv)) return *exit_code;
  const int signal_fd = MakeSignalFd();  // before any thread
  absl::Status status =
      InitLogging({.level = options.log_level, .format = "text", .process = "fake worker"});
  if (status.ok()) status = Serve(options, signal_fd);
  if (status.ok()) return kExitDrained;
  std::fprintf(stderr, "fake_worker: %s\n", std::string(status.message()).c_str());
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
      return kExitConfiguration;
    case absl::StatusCode::kDeadlineExceeded:
      return kExitHang;
    case absl::StatusCode::kAborted:
      return kExitRankLost;
    default:
      return kExitDeviceFault;
  }
}

}  // namespace
}  // namespace nibble

int main(int argc, char** argv) { return nibble::Main(argc, argv); }
