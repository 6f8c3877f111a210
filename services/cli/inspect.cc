#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/exit_codes.h"
#include "base/units.h"
#include "services/cli/commands.h"
#include "services/cli/table.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/inspect.h"

namespace nibble::cli {
namespace {

constexpr int32_t kDegreesShownMax = 16;
constexpr size_t kNameColumns = 16;

const char* TypeName(weights::FloatType type) {
  switch (type) {
    case weights::FloatType::kF16:
      return "fp16";
    case weights::FloatType::kBF16:
      return "bf16";
    case weights::FloatType::kF32:
      break;
  }
  return "fp32";
}

std::string DescribeQuantization(const weights::QuantizationConfig& config) {
  if (config.layout == weights::Layout::kNone) return "none";
  std::string text = absl::StrCat("AWQ, layout ", weights::LayoutName(config.layout), ", ",
                                  config.bits, " bits, ");
  absl::StrAppend(
      &text,
      config.group_size > 0 ? absl::StrCat("groups of ", config.group_size) : "one group a row",
      config.zero_point ? ", zero points" : ", symmetric");
  if (!config.modules_to_not_convert.empty()) {
    absl::StrAppend(&text,
                    "; left as they are: ", absl::StrJoin(config.modules_to_not_convert, ", "));
  }
  return text;
}

std::string DescribeStorage(const weights::StorageSummary& storage) {
  const std::string count = absl::StrCat(storage.linear_count, " linear layers, ",
                                         storage.weight_count / 1'000'000, " M weights: ");
  if (storage.layout == weights::Layout::kNone) {
    return absl::StrCat(count, TypeName(storage.stored_type));
  }
  return absl::StrCat(count, weights::LayoutName(storage.layout), ", groups of ",
                      storage.group_size, ", scales ", TypeName(storage.stored_type));
}

std::string DescribeModel(const weights::Checkpoint& checkpoint,
                          const weights::CheckpointReport& report) {
  const model::ModelSpec& spec = checkpoint.spec();
  std::string text;
  const auto line = [&text](const std::string& name, const std::string& value) {
    absl::StrAppend(&text, name, std::string(kNameColumns - name.size(), ' '), value, "\n");
  };
  line("architecture", absl::StrCat(spec.architecture, " (", spec.family, "), ",
                                    report.parameter_count / 1'000'000, " M parameters"));
  line("shape",
       absl::StrCat(spec.layer_count, " layers, hidden ", spec.hidden_size, ", ", spec.head_count,
                    " query heads over ", spec.kv_head_count, " KV heads of ", spec.head_dim,
                    ", FFN ", spec.ffn_size, ", vocabulary ", spec.vocab_size));
  line("context", absl::StrCat(spec.max_context, " positions"));
  line("format", DescribeQuantization(checkpoint.quantization()));
  for (const weights::StorageSummary& storage : report.storage) {
    line("layers", DescribeStorage(storage));
  }
  line("embedding", TypeName(report.embedding_type));
  line("head", spec.tied_head ? "tied to the embedding" : "its own");
  for (const weights::FileSummary& file : report.files) {
    line("file", absl::StrCat(file.name, ": ", file.tensor_count, " tensors, ",
                              FormatBytes(file.tensor_bytes)));
  }
  return text;
}

std::string DescribeDegrees(const weights::CheckpointReport& report) {
  std::vector<std::vector<std::string>> rows = {{"tp", "split", "KV heads", "weights of a rank"}};
  for (const weights::DegreeSummary& degree : report.degrees) {
    const std::string tp = absl::StrCat(degree.rank_count);
    if (!degree.possible.ok()) {
      rows.push_back({tp, "not possible", "-", "-"});
      continue;
    }
    const auto [low, high] =
        std::minmax_element(degree.weight_bytes.begin(), degree.weight_bytes.end());
    rows.push_back({tp, degree.even ? "even" : "uneven", degree.kv_replicated ? "shared" : "own",
                    *low == *high ? FormatBytes(*low)
                                  : absl::StrCat(FormatBytes(*low), " to ", FormatBytes(*high))});
  }
  return FormatTable(rows);
}

}  // namespace

int RunInspect(int argc, const char* const* argv) {
  std::string model;
  ConfigParser parser(CommandProgram("inspect",
                                     "Says what a model folder holds and how it splits over ranks.",
                                     "nibble inspect .cache/models/smollm2-135m-awq"));
  parser.Group("Model");
  parser.Folder("model", &model, "Folder of the model").Positional().Required();
  if (const auto code = parser.ParseMain(argc, argv)) return *code;
  const auto fail = [](const absl::Status& status) {
    std::fprintf(stderr, "nibble inspect: %s\n", std::string(status.message()).c_str());
    return kExitModel;
  };
  const auto checkpoint = weights::Checkpoint::Open(model);
  if (!checkpoint.ok()) return fail(checkpoint.status());
  const auto report = weights::InspectCheckpoint(**checkpoint, {}, kDegreesShownMax);
  if (!report.ok()) return fail(report.status());
  std::printf("%s\n%s", DescribeModel(**checkpoint, *report).c_str(),
              DescribeDegrees(*report).c_str());
  return kExitDrained;
}

}  // namespace nibble::cli
