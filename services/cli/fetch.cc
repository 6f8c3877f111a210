// `nibble fetch`: a model folder from a hub or a web server. The one command that connects to
// somebody outside, and only because it was told to.
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/exit_codes.h"
#include "base/progress.h"
#include "base/status.h"
#include "services/cli/commands.h"
#include "services/fetch/download.h"
#include "services/fetch/proxy.h"

namespace nibble::cli {
namespace {

constexpr char kHub[] = "https://huggingface.co";

int ExitCodeOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return kExitDrained;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kAlreadyExists:
      return kExitConfiguration;
    case absl::StatusCode::kDataLoss:
      return kExitModel;
    default:
      return kExitFailure;
  }
}

// HF_TOKEN and HF_ENDPOINT are what the hub's own tools read.
absl::Status ReadHub(fetch::FetchOptions* options) {
  const char* endpoint = std::getenv("HF_ENDPOINT");
  const bool given = endpoint != nullptr && *endpoint != '\0';
  absl::StatusOr<fetch::Url> hub = fetch::ParseUrl(given ? endpoint : kHub);
  if (!hub.ok()) {
    return absl::InvalidArgumentError(absl::StrCat("HF_ENDPOINT: ", hub.status().message()));
  }
  options->hub = *std::move(hub);
  if (!absl::EndsWith(options->hub.target, "/")) options->hub.target += '/';
  const char* token = std::getenv("HF_TOKEN");
  if (token != nullptr) options->token = std::string(absl::StripAsciiWhitespace(token));
  if (!std::all_of(options->token.begin(), options->token.end(), absl::ascii_isgraph)) {
    return absl::InvalidArgumentError("HF_TOKEN has characters that no token has");
  }
  if (options->token.empty() || options->hub.https) return absl::OkStatus();
  // A proxy would read it, too.
  ASSIGN_OR_RETURN(const auto proxy, fetch::ProxyFor(options->hub, options->http.env));
  if (options->hub.IsLoopback() && !proxy.has_value()) return absl::OkStatus();
  return absl::InvalidArgumentError("HF_TOKEN is not sent in clear text: HF_ENDPOINT is http://");
}

// A bar per file.
class Bars {
 public:
  void Show(const fetch::FileProgress& file) {
    if (file.number != number_) {
      number_ = file.number;
      bar_ = std::make_unique<Progress>(
          Progress::ForStderr(absl::StrCat(file.name, " (", file.number, " of ", file.count, ")"),
                              /*bytes=*/true),
          &clock_);
    }
    if (file.total >= file.done) bar_->Update(file.done, file.total);
  }

 private:
  SteadyClock clock_;
  size_t number_ = 0;
  std::unique_ptr<Progress> bar_;
};

}  // namespace

int RunFetch(int argc, const char* const* argv) {
  std::string source;
  fetch::FetchOptions options;
  ConfigParser parser(CommandProgram(
      "fetch",
      "Fetches a model folder. HF_TOKEN and HF_ENDPOINT are the hub's; proxies and authorities "
      "are\n"
      "what https_proxy, no_proxy, SSL_CERT_FILE and the like say.",
      "nibble fetch hf://Qwen/Qwen2.5-0.5B-Instruct-AWQ .cache/models/qwen2.5-0.5b-awq"));
  parser.Group("Model");
  parser
      .String("source", &source,
              "hf://ORG/MODEL[@REVISION], or https://HOST/FOLDER with a SHA256SUMS")
      .Positional()
      .Required();
  parser.String("folder", &options.folder, "Where it is to be; there once it is whole")
      .Positional()
      .Required();
  parser.Group("Patience");
  parser.Int("tries", &options.tries, {1, 1000}, "Of a request in a row that bring nothing new");
  parser.Time("retry_wait", &options.retry_wait,
              {std::chrono::milliseconds(1), std::chrono::hours(1)},
              "Before the second try; doubled with each, at most 30s");
  parser.Time("stall_timeout", &options.http.stall_timeout,
              {std::chrono::seconds(1), std::chrono::hours(1)}, "Without a byte, then tried again");
  if (const auto code = parser.ParseMain(argc, argv)) return *code;

  std::signal(SIGPIPE, SIG_IGN);
  Bars bars;
  options.http.env = [](const char* name) { return std::getenv(name); };
  options.sleep = [](Duration pause) { std::this_thread::sleep_for(pause); };
  options.say = [](const std::string& line) {
    std::fprintf(stderr, "nibble fetch: %s\n", line.c_str());
  };
  options.progress = [&bars](const fetch::FileProgress& file) { bars.Show(file); };
  absl::Status status = ReadHub(&options);
  if (status.ok()) {
    absl::StatusOr<fetch::Source> parsed = fetch::ParseSource(source);
    status = parsed.status();
    if (parsed.ok()) {
      options.source = *std::move(parsed);
      status = fetch::FetchModel(options);
    }
  }
  if (!status.ok()) {
    options.say(std::string(status.message()));
    return ExitCodeOf(status);
  }
  std::printf("%s\n", options.folder.c_str());
  return kExitDrained;
}

}  // namespace nibble::cli
