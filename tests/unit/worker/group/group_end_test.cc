#include "worker/group/group_end.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <csignal>

#include "base/exit_codes.h"

namespace nibble::group {
namespace {

RankEnd Killed(int32_t rank, bool told_to = false) {
  return {.rank = rank, .exit = {.code = 0, .signal = SIGKILL}, .told_to = told_to};
}
RankEnd Left(int32_t rank, int code, bool told_to = false) {
  return {.rank = rank, .exit = {.code = code, .signal = 0}, .told_to = told_to};
}
RankEnd Noted(int32_t rank, int code, const char* reason) {
  RankEnd end = Left(rank, code);
  end.reason_code = code;
  end.reason = reason;
  return end;
}

TEST(GroupEnd, BlamesTheRankThatWasKilledAndNotThoseThatMissedIt) {
  const std::array<RankEnd, 3> ends = {Noted(0, kExitRankLost, "a peer is gone"), Killed(1),
                                       Left(2, kExitRankLost, /*told_to=*/true)};
  const GroupEnd end = ExplainEnd(ends);
  EXPECT_EQ(end.exit_code, kExitRankLost);
  EXPECT_EQ(end.reason, "rank 1 was killed by signal 9 (Killed)");
}

TEST(GroupEnd, PrefersWhatARankSaysOfItself) {
  const std::array<RankEnd, 3> ends = {Killed(0, /*told_to=*/true), Left(1, 5, true),
                                       Noted(2, kExitModel, "layer 3 is cut short")};
  const GroupEnd end = ExplainEnd(ends);
  EXPECT_EQ(end.exit_code, kExitModel);
  EXPECT_EQ(end.reason, "rank 2: layer 3 is cut short");
}

TEST(GroupEnd, AHangOutranksTheRanksThatGaveUpWaiting) {
  const std::array<RankEnd, 2> ends = {Noted(0, kExitRankLost, "aborted"),
                                       Noted(1, kExitHang, "a step took 10 s")};
  EXPECT_EQ(ExplainEnd(ends).exit_code, kExitHang);
}

TEST(GroupEnd, ARankThatLeavesByItselfIsALossWhateverItsCode) {
  for (const int code : {0, 1, 42}) {
    const std::array<RankEnd, 2> ends = {Left(0, code), Killed(1, /*told_to=*/true)};
    const GroupEnd end = ExplainEnd(ends);
    EXPECT_EQ(end.exit_code, kExitRankLost);
    EXPECT_THAT(end.reason, testing::HasSubstr("rank 0 left with exit code"));
  }
}

TEST(GroupEnd, ACodeOutsideTheTableBecomesRankLost) {
  const std::array<RankEnd, 1> ends = {Noted(0, 99, "nonsense")};
  EXPECT_EQ(ExplainEnd(ends).exit_code, kExitRankLost);
}

}  // namespace
}  // namespace nibble::group
