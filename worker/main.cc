// nibble-worker: one group of ranks that share a model, or (with --rank) one of them.

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <string>
#include <vector>

#include "base/config.h"
#include "base/exit_codes.h"
#include "base/last_words.h"
#include "base/logging.h"
#include "worker/options.h"
#include "worker/rank.h"
#include "worker/rank_arguments.h"
#include "worker/supervise.h"

namespace nibble::worker {
namespace {

// Before any thread: they are read from a descriptor.
void BlockSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  ::pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
}

int Fail(const WorkerOptions& options, const absl::Status& status) {
  std::fprintf(stderr, "nibble-worker: %s\n", std::string(status.message()).c_str());
  WriteLastWords(options.termination_log, kExitConfiguration, std::string(status.message()));
  return kExitConfiguration;
}

int Main(std::vector<std::string> words) {
  BlockSignals();
  WorkerOptions options;
  const auto rank = TakeRankArguments(&words);
  if (!rank.ok()) return Fail(options, rank.status());

  ConfigParser parser(
      {.name = "nibble-worker",
       .summary = "Serves one model to gateways, from one or several ranks of this machine.",
       .example = "nibble-worker --model .cache/models/smollm2-135m-awq --tp 2"});
  DeclareOptions(&parser, &options);
  // A rank is told everything; the environment and the file were the supervisor's to read.
  const ConfigOutcome outcome = parser.Parse(words, [&rank](const char* name) -> const char* {
    return rank->has_value() ? nullptr : std::getenv(name);
  });
  std::fputs(outcome.out.c_str(), stdout);
  std::fputs(outcome.error.c_str(), stderr);
  if (outcome.exit_code.has_value()) {
    if (!outcome.error.empty()) {
      WriteLastWords(options.termination_log, *outcome.exit_code, outcome.error);
    }
    return *outcome.exit_code;
  }
  if (!rank->has_value()) {
    const auto env = [](const char* name) -> const char* { return std::getenv(name); };
    const absl::Status status = TakeLeaderWorkerSet(env, &options);
    if (!status.ok()) return Fail(options, status);
  }
  if (const absl::Status status = CompleteOptions(&options); !status.ok())
    return Fail(options, status);
  if (rank->has_value()) return RunRank(options, **rank);
  if (const absl::Status status = InitLogging(
          {.level = options.log_level, .format = options.log_format, .process = "worker"});
      !status.ok()) {
    return Fail(options, status);
  }
  return Supervise(options);
}

}  // namespace
}  // namespace nibble::worker

int main(int argc, char** argv) {
  return nibble::worker::Main(std::vector<std::string>(argv + 1, argv + argc));
}
