#include "base/vllm_names.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

namespace nibble {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

std::string Page(const prometheus::Registry& registry) {
  return prometheus::TextSerializer().Serialize(VllmFamilies(registry.Collect()));
}

TEST(VllmNames, HaveVllmsLabels) {
  prometheus::Registry registry;
  prometheus::BuildGauge()
      .Name("nibble_requests_waiting")
      .Help("Requests that wait.")
      .Labels({{"model", "m"}})
      .Register(registry)
      .Add({{"reason", "capacity"}})
      .Set(3);
  EXPECT_THAT(Page(registry), HasSubstr("# TYPE vllm:num_requests_waiting gauge\n"
                                        "vllm:num_requests_waiting{model_name=\"m\","
                                        "engine=\"0\"} 3"));
}

TEST(VllmNames, SeriesThatVllmDoesNotTellApartAreAddedUp) {
  prometheus::Registry registry;
  auto& requests =
      prometheus::BuildCounter().Name("nibble_requests_total").Help("Requests.").Register(registry);
  int64_t count = 1;
  for (const auto& [code, finish] :
       std::initializer_list<std::pair<const char*, const char*>>{{"OK", "stop"},
                                                                  {"OK", "length"},
                                                                  {"CANCELLED", "none"},
                                                                  {"DEADLINE_EXCEEDED", "none"},
                                                                  {"INTERNAL", "none"}}) {
    requests.Add({{"model", "m"}, {"code", code}, {"finish_reason", finish}})
        .Increment(static_cast<double>(count));
    count *= 10;
  }
  const std::string page = Page(registry);
  for (const auto& [reason, value] : std::initializer_list<std::pair<const char*, const char*>>{
           {"stop", "1"}, {"length", "10"}, {"abort", "1100"}, {"error", "10000"}}) {
    EXPECT_THAT(page, HasSubstr(std::string("finished_reason=\"") + reason + "\"} " + value + "\n"))
        << reason;
  }
}

TEST(VllmNames, HistogramsKeepTheirBuckets) {
  prometheus::Registry registry;
  auto& family = prometheus::BuildHistogram()
                     .Name("nibble_gateway_request_prompt_tokens")
                     .Help("Prompts.")
                     .Register(registry);
  const prometheus::Histogram::BucketBoundaries bounds = {1, 10};
  family.Add({{"model", "a"}, {"kind", "x"}}, bounds).Observe(5);
  family.Add({{"model", "a"}, {"kind", "y"}}, bounds).Observe(0.5);
  family.Add({{"model", "b"}}, bounds).Observe(100);
  const std::string page = Page(registry);
  const std::string a = "vllm:request_prompt_tokens_bucket{model_name=\"a\",engine=\"0\",le=";
  EXPECT_THAT(page, HasSubstr(a + "\"1\"} 1\n"));
  EXPECT_THAT(page, HasSubstr(a + "\"10\"} 2\n"));
  EXPECT_THAT(page, HasSubstr(a + "\"+Inf\"} 2\n"));
  EXPECT_THAT(page, HasSubstr("_sum{model_name=\"a\",engine=\"0\"} 5.5\n"));
  EXPECT_THAT(page, HasSubstr("_count{model_name=\"b\",engine=\"0\"} 1\n"));
}

TEST(VllmNames, TheCachesSizeStandsInLabels) {
  prometheus::Registry registry;
  for (const auto& [name, value] : {std::pair{"nibble_kv_cache_blocks_capacity", 4096.0},
                                    std::pair{"nibble_kv_cache_block_tokens", 16.0}}) {
    prometheus::BuildGauge()
        .Name(name)
        .Help("-")
        .Register(registry)
        .Add({{"model", "m"}})
        .Set(value);
  }
  EXPECT_THAT(Page(registry), HasSubstr("vllm:cache_config_info{model_name=\"m\",engine=\"0\","
                                        "block_size=\"16\",num_gpu_blocks=\"4096\"} 1"));
}

TEST(VllmNames, WhatIsNotThereIsNotMadeUp) {
  prometheus::Registry registry;
  prometheus::BuildGauge().Name("nibble_other").Help("-").Register(registry).Add({});
  EXPECT_THAT(VllmFamilies(registry.Collect()), IsEmpty());
}

}  // namespace
}  // namespace nibble
