#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/exit_codes.h"
#include "base/units.h"
#include "services/cli/commands.h"
#include "services/cli/planned_model.h"
#include "services/cli/serve_options.h"
#include "services/cli/table.h"
#include "worker/weights/memory_plan.h"

namespace nibble::cli {
namespace {

std::string Describe(const weights::MemoryPlan& plan) {
  const weights::MemoryOptions& options = plan.options;
  std::vector<std::vector<std::string>> rows = {
      {"rank", "weights", "KV blocks", "activations", "workspace", "graphs", "total", "budget"}};
  for (const weights::RankMemoryPlan& rank : plan.ranks) {
    const int64_t kv_bytes = rank.kv_blocks * rank.kv_block_bytes;
    rows.push_back({absl::StrCat(rank.share.rank), FormatBytes(rank.weight_bytes),
                    FormatBytes(kv_bytes), FormatBytes(rank.activation_bytes),
                    FormatBytes(rank.workspace_bytes), FormatBytes(rank.graph_bytes),
                    FormatBytes(rank.total_bytes()),
                    options.memory_bytes > 0 ? FormatBytes(options.memory_bytes) : "none"});
  }
  const int32_t per_sequence =
      (plan.max_context + weights::kBlockTokens - 1) / weights::kBlockTokens;
  std::string text = FormatTable(rows);
  absl::StrAppend(&text, "\nKV cache: ", plan.kv_blocks, " blocks of ", weights::kBlockTokens,
                  " positions on every rank = ", int64_t{plan.kv_blocks} * weights::kBlockTokens,
                  " positions\n");
  absl::StrAppend(&text, "sequences of the whole context (", plan.max_context,
                  " positions) that fit at once: ", plan.kv_blocks / per_sequence,
                  "; slots: ", options.max_slots, "\n");
  return text;
}

}  // namespace

int RunPlan(int argc, const char* const* argv) {
  std::string model;
  int32_t tp = 1;
  int32_t threads = 0;
  std::string device = "cpu";
  weights::MemoryOptions options;
  ConfigParser parser(CommandProgram(
      "plan", "Says what every rank allocates, from the headers of the files alone.",
      "nibble plan .cache/models/smollm2-135m-awq --tp 2 --context 2048 --memory 2GiB"));
  parser.Group("Model");
  parser.Folder("model", &model, "Folder of the model").Positional().Required();
  parser.Group("Compute");
  parser.Int("tp", &tp, {1, 64}, "Ranks that share the model");
  parser.Choice<std::string>("device", &device, {{"cpu", "cpu"}, {"cuda", "cuda"}},
                             "Where ranks compute");
  parser.Int("threads", &threads, {0, 1024}, "Threads of one rank; 0: a fair share");
  DeclareMemoryOptions(&parser, &options);
  if (const auto code = parser.ParseMain(argc, argv)) return *code;
  options.threads = RankThreads(threads, tp);
  int exit_code = kExitDrained;
  if (const auto status = CheckDevice(device); !status.ok()) {
    std::fprintf(stderr, "nibble plan: %s\n", std::string(status.message()).c_str());
    return kExitConfiguration;
  }
  const auto planned = OpenAndPlan(model, tp, device, options, &exit_code);
  if (!planned.ok()) {
    std::fprintf(stderr, "nibble plan: %s\n", std::string(planned.status().message()).c_str());
    return exit_code;
  }
  std::fputs(Describe(planned->plan).c_str(), stdout);
  return kExitDrained;
}

}  // namespace nibble::cli
