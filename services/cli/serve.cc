#include <stdlib.h>
#include <unistd.h>

#include <cstdio>
#include <ctime>
#include <filesystem>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/api_keys.h"
#include "base/exit_codes.h"
#include "base/logging.h"
#include "base/status.h"
#include "base/tls_options.h"
#include "services/cli/commands.h"
#include "services/cli/planned_model.h"
#include "services/cli/serve_options.h"
#include "services/cli/supervision.h"
#include "services/text/tokenizer.h"
#include "worker/weights/machine_memory.h"

namespace nibble::cli {
namespace {

// Longest path of a unix socket.
constexpr size_t kSocketPathMax = 107;
// As the leader reads them.
constexpr int64_t kTokenizerFileBytesMax = int64_t{64} << 20;

// A private folder that goes with its owner.
class ScratchFolder {
 public:
  [[nodiscard]] static absl::StatusOr<ScratchFolder> Create() {
    const char* base = std::getenv("TMPDIR");
    std::string path = absl::StrCat(base != nullptr ? base : "/tmp", "/nibble-XXXXXX");
    const size_t longest = path.size() + std::string("/worker.sock").size();
    if (longest > kSocketPathMax || path.find(',') != std::string::npos) {
      path = "/tmp/nibble-XXXXXX";
    }
    if (mkdtemp(path.data()) == nullptr) {
      return absl::InternalError(absl::StrCat("no private folder can be made at ", path));
    }
    return ScratchFolder(path);
  }
  ~ScratchFolder() {
    std::error_code ignored;
    if (!path_.empty()) std::filesystem::remove_all(path_, ignored);
  }
  ScratchFolder(ScratchFolder&& other) noexcept : path_(std::exchange(other.path_, {})) {}
  ScratchFolder& operator=(ScratchFolder&&) = delete;

  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  explicit ScratchFolder(std::string path) : path_(std::move(path)) {}
  std::string path_;
};

std::string FolderOfThisProgram() {
  std::error_code error;
  return std::filesystem::read_symlink("/proc/self/exe", error).parent_path().string();
}

// The gateway would find out only once the workers have loaded.
absl::Status CheckTokenizer(const weights::Checkpoint& checkpoint) {
  text::TokenizerFiles files;
  ASSIGN_OR_RETURN(files.tokenizer_json,
                   checkpoint.ReadFile("tokenizer.json", kTokenizerFileBytesMax));
  for (const auto& [name, contents] :
       {std::pair{"tokenizer_config.json", &files.tokenizer_config_json},
        std::pair{"chat_template.jinja", &files.chat_template}}) {
    auto read = checkpoint.ReadFile(name, kTokenizerFileBytesMax);
    if (!read.ok() && absl::IsNotFound(read.status())) continue;
    RETURN_IF_ERROR(read.status());
    *contents = *std::move(read);
  }
  return text::Tokenizer::Create(files).status();
}

int Fail(const absl::Status& status, int code) {
  std::fprintf(stderr, "nibble serve: %s\n", std::string(status.message()).c_str());
  return code;
}

}  // namespace

int RunServe(int argc, const char* const* argv) {
  ServeOptions options;
  ConfigParser parser(CommandProgram(
      "serve", "Serves a model: a gateway and one group of workers, until told to end.",
      "nibble serve .cache/models/smollm2-135m-awq --tp 2 --port 50051"));
  DeclareServeOptions(&parser, &options);
  if (const auto code = parser.ParseMain(argc, argv)) return *code;
  if (const auto status = CheckServeOptions(options); !status.ok()) {
    return Fail(status, kExitConfiguration);
  }
  // The gateway would find out only once the workers have loaded.
  if (const auto tls = ReadTlsFiles(options.tls, ServerTlsNames(), std::time(nullptr)); !tls.ok()) {
    return Fail(tls.status(), kExitConfiguration);
  }
  if (!options.keys_file.empty()) {
    if (const auto keys = ReadApiKeys(options.keys_file); !keys.ok()) {
      return Fail(keys.status(), kExitConfiguration);
    }
  }
  if (const auto status = InitLogging(
          {.level = options.log_level, .format = options.log_format, .process = "serve"});
      !status.ok()) {
    return Fail(status, kExitConfiguration);
  }
  // The worker reads the same headers again: a model that cannot be served is refused here in one
  // line, before any process starts or port opens.
  options.memory.threads = RankThreads(options.threads, options.tp);
  int exit_code = kExitDrained;
  const auto planned =
      OpenAndPlan(options.model, options.tp, options.device, options.memory, &exit_code);
  if (!planned.ok()) return Fail(planned.status(), exit_code);
  if (options.device == "cpu") {
    const auto status = weights::CheckFits(planned->plan, weights::MachineMemory());
    if (!status.ok()) return Fail(status, kExitNoMemory);
  }
  if (const auto status = CheckTokenizer(*planned->checkpoint); !status.ok()) {
    return Fail(absl::Status(status.code(), absl::StrCat(options.model, ": ", status.message())),
                kExitModel);
  }
  const auto scratch = ScratchFolder::Create();
  if (!scratch.ok()) return Fail(scratch.status(), kExitFailure);
  Supervision supervision(options, {.programs = FolderOfThisProgram(), .scratch = scratch->path()});
  return supervision.Run();
}

}  // namespace nibble::cli
