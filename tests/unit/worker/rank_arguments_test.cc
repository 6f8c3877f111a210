#include "worker/rank_arguments.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace nibble::worker {
namespace {

TEST(RankArguments, ComeBackAsTheyWereWritten) {
  const RankArguments written{.rank = 3,
                              .stats_fd = 10,
                              .control_fd = 11,
                              .ring_fd = -1,
                              .collectives_fd = 13,
                              .death_fd = 14,
                              .command_fd = -1};
  std::vector<std::string> words = Format(written);
  words.push_back("--model=here");
  const auto read = TakeRankArguments(&words);
  ASSERT_TRUE(read.ok()) << read.status();
  ASSERT_TRUE(read->has_value());
  EXPECT_EQ((*read)->rank, 3);
  EXPECT_EQ((*read)->stats_fd, 10);
  EXPECT_EQ((*read)->control_fd, 11);
  EXPECT_EQ((*read)->ring_fd, -1);
  EXPECT_EQ((*read)->collectives_fd, 13);
  EXPECT_EQ((*read)->death_fd, 14);
  EXPECT_EQ((*read)->command_fd, -1);
  EXPECT_THAT(words, testing::ElementsAre("--model=here"));
}

TEST(RankArguments, AreAbsentFromTheSupervisorsCommandLine) {
  std::vector<std::string> words = {"--model=here", "--tp=2"};
  const auto read = TakeRankArguments(&words);
  ASSERT_TRUE(read.ok());
  EXPECT_FALSE(read->has_value());
  EXPECT_EQ(words.size(), 2u);
}

TEST(RankArguments, RefuseWhatTheSupervisorDoesNotWrite) {
  const std::vector<std::vector<std::string>> lines = {
      {"--rank=0"},
      {"--rank=-1", "--stats-fd=1"},
      {"--rank=64", "--stats-fd=1", "--control-fd=1", "--ring-fd=1", "--collectives-fd=1",
       "--death-fd=1", "--command-fd=1"},
      {"--rank=0", "--stats-fd=x", "--control-fd=1", "--ring-fd=1", "--collectives-fd=1",
       "--death-fd=1", "--command-fd=1"}};
  for (std::vector<std::string> words : lines) {
    EXPECT_EQ(TakeRankArguments(&words).status().code(), absl::StatusCode::kInvalidArgument);
  }
}

}  // namespace
}  // namespace nibble::worker
