#include "worker/rank_arguments.h"

#include <array>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "worker/step/group_stats.h"

namespace nibble::worker {
namespace {

struct Part {
  const char* flag;
  int RankArguments::*member;
  int min;  // -1: may be absent, and is then written as such
};

// In this order, all of them.
constexpr std::array<Part, 7> kParts = {{{"--rank=", &RankArguments::rank, 0},
                                         {"--stats-fd=", &RankArguments::stats_fd, 0},
                                         {"--control-fd=", &RankArguments::control_fd, 0},
                                         {"--ring-fd=", &RankArguments::ring_fd, -1},
                                         {"--collectives-fd=", &RankArguments::collectives_fd, -1},
                                         {"--death-fd=", &RankArguments::death_fd, 0},
                                         {"--command-fd=", &RankArguments::command_fd, -1}}};

}  // namespace

std::vector<std::string> Format(const RankArguments& arguments) {
  std::vector<std::string> words;
  for (const Part& part : kParts) words.push_back(absl::StrCat(part.flag, arguments.*part.member));
  return words;
}

absl::StatusOr<std::optional<RankArguments>> TakeRankArguments(std::vector<std::string>* words) {
  if (words->empty() || !absl::StartsWith(words->front(), kParts[0].flag)) return std::nullopt;
  RankArguments arguments;
  for (size_t i = 0; i < kParts.size(); ++i) {
    const Part& part = kParts[i];
    const std::string word = i < words->size() ? (*words)[i] : "";
    int value = -1;
    if (!absl::StartsWith(word, part.flag) ||
        !absl::SimpleAtoi(word.substr(std::string(part.flag).size()), &value) || value < part.min ||
        (part.member == &RankArguments::rank && value >= step::kMaxRanks)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--rank is internal: ", part.flag, " expected, not \"", word, "\""));
    }
    arguments.*part.member = value;
  }
  words->erase(words->begin(), words->begin() + kParts.size());
  return arguments;
}

}  // namespace nibble::worker
