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
#include "worker/weights/memory_plan.h"

namespace nibble::cli {
namespace {

constexpr int32_t kDegreesShownMax = 16;

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

std::string DescribeModel(const weights::Checkpoint& checkpoint) {
  const model::ModelSpec& spec = checkpoint.spec();
  int64_t stored = 0;
  const std::vector<std::string> names = checkpoint.TensorNames();
  for (const std::string& name : names) {
    stored += static_cast<int64_t>(checkpoint.Find(name)->data.size());
  }
  std::string text;
  const auto line = [&text](const char* name, const std::string& value) {
    absl::StrAppend(&text, name, std::string(16 - std::string(name).size(), ' '), value, "\n");
  };
  line("architecture", absl::StrCat(spec.architecture, " (", spec.family, ")"));
  line("shape",
       absl::StrCat(spec.layer_count, " layers, hidden ", spec.hidden_size, ", ", spec.head_count,
                    " query heads over ", spec.kv_head_count, " KV heads of ", spec.head_dim,
                    ", FFN ", spec.ffn_size, ", vocabulary ", spec.vocab_size));
  line("context", absl::StrCat(spec.max_context, " positions"));
  line("quantization", DescribeQuantization(checkpoint.quantization()));
  line("head", spec.tied_head ? "tied to the embedding" : "its own");
  line("stored", absl::StrCat(names.size(), " tensors, ", FormatBytes(stored)));
  return text;
}

// Heads and FFN columns of all ranks alike.
bool SplitsEvenly(const weights::MemoryPlan& plan) {
  const weights::RankShare& first = plan.ranks.front().share;
  return std::all_of(plan.ranks.begin(), plan.ranks.end(), [&first](const auto& rank) {
    return rank.share.heads.count() == first.heads.count() &&
           rank.share.kv_heads.count() == first.kv_heads.count() &&
           rank.share.ffn.count() == first.ffn.count();
  });
}

// "3", or "2 to 3" over the ranks.
template <typename Value, typename Text>
std::string Spread(const weights::MemoryPlan& plan, const Value& value, const Text& text) {
  const auto [low, high] =
      std::minmax_element(plan.ranks.begin(), plan.ranks.end(),
                          [&value](const auto& a, const auto& b) { return value(a) < value(b); });
  if (value(*low) == value(*high)) return text(value(*low));
  return absl::StrCat(text(value(*low)), " to ", text(value(*high)));
}

std::string DescribeDegrees(const weights::Checkpoint& checkpoint) {
  std::vector<std::vector<std::string>> rows = {
      {"tp", "even", "query heads", "KV heads", "FFN columns", "weights per rank"}};
  const auto number = [](int64_t value) { return absl::StrCat(value); };
  const int32_t most = std::min(checkpoint.spec().head_count, kDegreesShownMax);
  for (int32_t tp = 1; tp <= most; ++tp) {
    const auto plan = weights::PlanMemory(checkpoint, tp, {});
    if (!plan.ok()) {
      rows.push_back({absl::StrCat(tp), "no", "-", "-", "-", "-"});
      continue;
    }
    using Rank = weights::RankMemoryPlan;
    rows.push_back(
        {absl::StrCat(tp), SplitsEvenly(*plan) ? "yes" : "no",
         Spread(
             *plan, [](const Rank& rank) { return rank.share.heads.count(); }, number),
         Spread(
             *plan, [](const Rank& rank) { return rank.share.kv_heads.count(); }, number),
         Spread(
             *plan, [](const Rank& rank) { return rank.share.ffn.count(); }, number),
         Spread(
             *plan, [](const Rank& rank) { return rank.weight_bytes; }, FormatBytes)});
  }
  return FormatTable(rows);
}

}  // namespace

int RunInspect(int argc, const char* const* argv) {
  std::string model;
  ConfigParser parser(CommandProgram("inspect",
                                     "Says what a model folder holds and how it splits over ranks.",
                                     "nibble inspect build/models/smollm2-135m-awq"));
  parser.Group("Model");
  parser.String("model", &model, "Folder of the model").Positional().Required();
  if (const auto code = parser.ParseMain(argc, argv)) return *code;
  const auto checkpoint = weights::Checkpoint::Open(model);
  // A tensor that is missing or does not fit is found by the plan of one rank.
  const absl::Status sound =
      checkpoint.ok() ? weights::PlanMemory(**checkpoint, 1, {}).status() : checkpoint.status();
  if (!sound.ok()) {
    std::fprintf(stderr, "nibble inspect: %s\n", std::string(sound.message()).c_str());
    return kExitModel;
  }
  std::printf("%s\n%s", DescribeModel(**checkpoint).c_str(), DescribeDegrees(**checkpoint).c_str());
  return kExitDrained;
}

}  // namespace nibble::cli
