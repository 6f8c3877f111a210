#include "worker/group/group_metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <prometheus/text_serializer.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <set>
#include <sstream>
#include <string>

#include "tests/support/test_data.h"

namespace nibble::group {
namespace {

class GroupMetricsTest : public ::testing::Test {
 protected:
  std::string Text(const std::string& device = "cpu") {
    GroupMetrics metrics(stats_.get(), &clock_,
                         {.model = "tiny",
                          .architecture = "LlamaForCausalLM",
                          .quantization = "gemm",
                          .group_size = 64,
                          .tensor_parallel = 2,
                          .numerics = "fast",
                          .head = "int8",
                          .max_context = 2048,
                          .device = device});
    return prometheus::TextSerializer().Serialize(metrics.Collect());
  }
  std::unique_ptr<step::GroupStats> stats_ = std::make_unique<step::GroupStats>();
  SteadyClock clock_;
};

TEST_F(GroupMetricsTest, ExportsWhatWasCounted) {
  step::EngineStats& engine = stats_->engine;
  engine.requests_running.Set(3);
  engine.kv_blocks_used.Set(25);
  engine.kv_blocks_cached.Set(30);
  engine.kv_blocks_total.Set(100);
  engine.cached_prompt_tokens.Add(96);
  engine.prefix_queried_tokens.Add(120);
  engine.prefix_hit_tokens.Add(97);
  engine.generated_tokens.Add(1234);
  engine.steps[step::kDecodeStep].Add(5);
  engine.rejected[step::kQueueFull].Add(2);
  engine.step_seconds[step::kDecodeStep].Observe(step::kStepSecondsBounds, 0.0025);
  engine.step_seconds[step::kDecodeStep].Observe(step::kStepSecondsBounds, 7);
  stats_->ranks[1].up.Set(1);
  stats_->ranks[1].weights_bytes.Set(4096);
  stats_->ranks[1].weights_planned_bytes.Set(4000);
  const std::string text = Text();
  for (const char* line :
       {"nibble_requests_running{model=\"tiny\"} 3\n",
        "nibble_kv_cache_usage_ratio{model=\"tiny\"} 0.25\n",
        "nibble_kv_cache_blocks{model=\"tiny\",state=\"cached\"} 30\n",
        "nibble_prompt_tokens_total{model=\"tiny\",source=\"cached\"} 96\n",
        "nibble_prefix_cache_queried_tokens_total{model=\"tiny\"} 120\n",
        "nibble_prefix_cache_hit_tokens_total{model=\"tiny\"} 97\n",
        "nibble_generated_tokens_total{model=\"tiny\"} 1234\n",
        "nibble_engine_steps_total{model=\"tiny\",kind=\"decode\"} 5\n",
        "nibble_requests_rejected_total{model=\"tiny\",reason=\"queue_full\"} 2\n",
        "nibble_step_duration_seconds_bucket{model=\"tiny\",kind=\"decode\",le=\"0.002\"} 0\n",
        "nibble_step_duration_seconds_bucket{model=\"tiny\",kind=\"decode\",le=\"0.003\"} 1\n",
        "nibble_step_duration_seconds_bucket{model=\"tiny\",kind=\"decode\",le=\"1\"} 1\n",
        "nibble_step_duration_seconds_bucket{model=\"tiny\",kind=\"decode\",le=\"+Inf\"} 2\n",
        "nibble_step_duration_seconds_count{model=\"tiny\",kind=\"decode\"} 2\n",
        "nibble_rank_up{model=\"tiny\",rank=\"0\"} 0\n",
        "nibble_rank_up{model=\"tiny\",rank=\"1\"} 1\n",
        "nibble_memory_bytes{model=\"tiny\",device=\"cpu\",rank=\"1\",kind=\"weights\"} 4096\n",
        "nibble_memory_planned_bytes{model=\"tiny\",device=\"cpu\",rank=\"1\",kind=\"weights\"} "
        "4000\n"}) {
    EXPECT_THAT(text, ::testing::HasSubstr(line));
  }
  EXPECT_THAT(text, ::testing::Not(::testing::HasSubstr("rank=\"2\"")));
}

TEST_F(GroupMetricsTest, OnGpusGraphsAndTheContextAreOwnersToo) {
  stats_->ranks[1].graphs_bytes.Set(7);
  stats_->ranks[1].graphs_planned_bytes.Set(8);
  stats_->ranks[1].context_bytes.Set(9);
  const std::string rank = "{model=\"tiny\",device=\"cuda\",rank=\"1\",kind=\"";
  const std::string text = Text("cuda");
  for (const std::string& line : {"nibble_memory_bytes" + rank + "graphs\"} 7\n",
                                  "nibble_memory_planned_bytes" + rank + "graphs\"} 8\n",
                                  "nibble_memory_bytes" + rank + "context\"} 9\n"}) {
    EXPECT_THAT(text, ::testing::HasSubstr(line));
  }
  EXPECT_THAT(Text("cpu"), ::testing::Not(::testing::HasSubstr("kind=\"graphs\"")));
}

// Names are an interface: dashboards and alerts are written against them.
TEST_F(GroupMetricsTest, NamesAreThoseOfTheList) {
  std::set<std::string> names;
  std::istringstream text(Text());
  for (std::string line; std::getline(text, line);) {
    std::istringstream words(line);
    std::string hash, type, name, kind;
    words >> hash >> type >> name >> kind;
    if (type == "TYPE") names.insert(name + " " + kind);
  }
  std::set<std::string> expected;
  std::ifstream list(testing::SourceDir() + "/tests/unit/worker/group/metric_names.txt");
  for (std::string line; std::getline(list, line);) expected.insert(line);
  EXPECT_EQ(names, expected);
}

// Where promtool is installed; `make test` installs it.
TEST_F(GroupMetricsTest, PromtoolFindsNothingToSay) {
  if (std::system("command -v promtool > /dev/null") != 0) {
    std::fprintf(stderr, "NOT RUN: PromtoolFindsNothingToSay (no promtool)\n");
    return;
  }
  FILE* const promtool = ::popen("promtool check metrics 2>&1", "w");
  ASSERT_NE(promtool, nullptr);
  const std::string text = Text();
  EXPECT_EQ(std::fwrite(text.data(), 1, text.size(), promtool), text.size());
  EXPECT_EQ(::pclose(promtool), 0);
}

}  // namespace
}  // namespace nibble::group
