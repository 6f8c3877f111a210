#include <algorithm>
#include <cstdio>
#include <string>
#include <thread>

#include "base/exit_codes.h"
#include "base/progress.h"
#include "services/cli/commands.h"
#include "worker/quantize/rtn.h"

namespace nibble::cli {
namespace {

enum class Method { kRtn };

int ExitCodeOf(const absl::Status& status) {
  if (status.ok()) return kExitDrained;
  return absl::IsAlreadyExists(status) ? kExitConfiguration : kExitModel;
}

}  // namespace

int RunQuantize(int argc, const char* const* argv) {
  quantize::RtnOptions options;
  Method method = Method::kRtn;
  ConfigParser parser(CommandProgram(
      "quantize", "Writes a 4-bit AutoAWQ gemm checkpoint of an unquantized model folder.",
      "nibble quantize --method rtn --group-size 32 \\\n"
      "  .cache/models/smollm2-135m .cache/models/smollm2-135m-awq-g32"));
  parser.Group("Folders");
  parser.Folder("input", &options.input_folder, "The model").Positional().Required();
  parser.String("output", &options.output_folder, "The checkpoint; must not exist, or be empty")
      .Positional()
      .Required();
  parser.Group("Quantization");
  parser.Choice<Method>("method", &method, {{"rtn", Method::kRtn}},
                        "How values are chosen; rtn: the nearest, without calibration");
  parser.Choice<int32_t>("group_size", &options.group_size,
                         {{"32", 32}, {"64", 64}, {"128", 128}, {"-1", -1}},
                         "Columns that share a scale; -1: a whole row");
  options.threads = static_cast<int32_t>(std::max(1U, std::thread::hardware_concurrency()));
  parser.Int("threads", &options.threads, {1, 1024}, "Threads");
  if (const auto code = parser.ParseMain(argc, argv)) return *code;

  const SteadyClock clock;
  Progress progress(Progress::ForStderr("quantizing", /*bytes=*/true), &clock);
  options.progress = [&progress](int64_t done, int64_t total) { progress.Update(done, total); };
  const absl::Status status = quantize::QuantizeRtn(options);
  if (!status.ok()) {
    std::fprintf(stderr, "nibble quantize: %s\n", std::string(status.message()).c_str());
    return ExitCodeOf(status);
  }
  std::printf("wrote %s\n", options.output_folder.c_str());
  return kExitDrained;
}

}  // namespace nibble::cli
