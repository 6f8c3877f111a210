#include "services/cli/restart_backoff.h"

#include <gtest/gtest.h>

namespace nibble::cli {
namespace {

using std::chrono::minutes;
using std::chrono::seconds;

TEST(RestartBackoff, DoublesFromOneSecondToThirty) {
  RestartBackoff backoff;
  for (const int expected : {1, 2, 4, 8, 16, 30, 30}) {
    EXPECT_EQ(backoff.Next(seconds(1)), seconds(expected));
  }
}

TEST(RestartBackoff, BeginsAgainAfterAHealthyMinute) {
  RestartBackoff backoff;
  EXPECT_EQ(backoff.Next(seconds(1)), seconds(1));
  EXPECT_EQ(backoff.Next(seconds(59)), seconds(2));
  EXPECT_EQ(backoff.Next(minutes(1)), seconds(1));
  EXPECT_EQ(backoff.Next(seconds(0)), seconds(2));
}

}  // namespace
}  // namespace nibble::cli
