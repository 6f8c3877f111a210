#include "base/progress.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

namespace nibble {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;

class ProgressTest : public ::testing::Test {
 protected:
  ProgressTest() { EXPECT_EQ(pipe(pipe_), 0); }
  ~ProgressTest() override { close(pipe_[0]); }

  // Advances in steps of 100 ms through `duration`, from nothing to everything.
  std::string Run(bool terminal, Duration duration) {
    ManualClock clock;
    {
      Progress progress({.what = "work", .terminal = terminal, .descriptor = pipe_[1]}, &clock);
      const Duration step = std::chrono::milliseconds(100);
      for (Duration at{}; at <= duration; at += step) {
        progress.Update(at / step, duration / step);
        clock.Advance(step);
      }
    }
    close(pipe_[1]);
    std::string text(1 << 16, '\0');
    text.resize(static_cast<size_t>(read(pipe_[0], text.data(), text.size())));
    return text;
  }

  int pipe_[2] = {-1, -1};
};

TEST_F(ProgressTest, SaysNothingAboutShortWork) {
  EXPECT_THAT(Run(true, std::chrono::milliseconds(1900)), IsEmpty());
}

TEST_F(ProgressTest, DrawsABarOnATerminal) {
  const std::string text = Run(true, std::chrono::seconds(4));
  EXPECT_THAT(text, HasSubstr("\rwork [###############...............]  50 %  20 of 40, 2 s"));
  EXPECT_THAT(text, HasSubstr("[##############################] 100 %  40 of 40, 4 s"));
  EXPECT_EQ(text.back(), '\n');
}

TEST_F(ProgressTest, PrintsALineNowAndThenElsewhere) {
  EXPECT_EQ(Run(false, std::chrono::seconds(10)),
            "work:  20 %  20 of 100, 2 s\n"
            "work:  70 %  70 of 100, 7 s\n"
            "work: 100 %  100 of 100, 10 s\n");
}

}  // namespace
}  // namespace nibble
