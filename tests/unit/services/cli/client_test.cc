#include "services/cli/client.h"

#include <gtest/gtest.h>

namespace nibble::cli {
namespace {

TEST(SafeForTerminal, KeepsTextAndBlanksControls) {
  EXPECT_EQ(SafeForTerminal("Grüße,\n\tWelt 😀"), "Grüße,\n\tWelt 😀");
  EXPECT_EQ(SafeForTerminal("a\x1b[31mb\x07\x7f\r"), "a [31mb   ");
  EXPECT_EQ(SafeForTerminal("a\xc2\x9b"
                            "31m"),
            "a 31m");                                  // CSI in eight bits
  EXPECT_EQ(SafeForTerminal("\xc2\xa0"), "\xc2\xa0");  // a no-break space is text
}

TEST(ClientRequest, HasTheFieldsThatWereGivenAndNoOther) {
  ClientOptions options;
  options.temperature = 0;
  options.seed = 7;
  pb::SamplingParams sampling;
  FillSampling(options, &sampling);
  EXPECT_TRUE(sampling.has_temperature());
  EXPECT_EQ(sampling.temperature(), 0);
  EXPECT_EQ(sampling.seed(), 7U);
  EXPECT_FALSE(sampling.has_top_p());
  EXPECT_FALSE(sampling.has_top_k());

  options.max_tokens = 3;
  options.stop = {"a", "b"};
  pb::StoppingCriteria stopping;
  FillStopping(options, &stopping);
  EXPECT_EQ(stopping.max_tokens(), 3U);
  EXPECT_EQ(stopping.stop_size(), 2);
}

TEST(AnswerPrinter, CountsTokensAndTimes) {
  ManualClock clock;
  AnswerPrinter printer(/*terminal=*/false, &clock);
  pb::Delta delta;
  delta.set_text("one ");
  clock.Advance(std::chrono::milliseconds(250));
  printer.OnDelta(delta);
  clock.Advance(std::chrono::seconds(2));
  delta.set_text("two");
  printer.OnDelta(delta);
  pb::Finished finished;
  finished.mutable_usage()->set_prompt_tokens(5);
  finished.mutable_usage()->set_completion_tokens(21);
  printer.OnFinished(finished);
  EXPECT_EQ(printer.text(), "one two");
  EXPECT_EQ(printer.End(), "5 prompt tokens, 21 tokens, first after 0.25 s, 10.0 tokens/s");
}

}  // namespace
}  // namespace nibble::cli
