#include "base/vllm_names.h"

#include <prometheus/client_metric.h>

#include <algorithm>
#include <array>
#include <string>
#include <utility>

namespace nibble {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using Labels = std::vector<ClientMetric::Label>;

struct Alias {
  const char* own;
  const char* vllm;
  bool by_finish = false;  // with the label finished_reason
};

constexpr std::array kAliases = {
    Alias{"nibble_requests_running", "vllm:num_requests_running"},
    Alias{"nibble_requests_waiting", "vllm:num_requests_waiting"},
    Alias{"nibble_kv_cache_usage_ratio", "vllm:kv_cache_usage_perc"},
    Alias{"nibble_prompt_tokens_total", "vllm:prompt_tokens_total"},
    Alias{"nibble_generated_tokens_total", "vllm:generation_tokens_total"},
    Alias{"nibble_prefix_cache_queried_tokens_total", "vllm:prefix_cache_queries_total"},
    Alias{"nibble_prefix_cache_hit_tokens_total", "vllm:prefix_cache_hits_total"},
    Alias{"nibble_preemptions_total", "vllm:num_preemptions_total"},
    Alias{"nibble_requests_total", "vllm:request_success_total", true},
    Alias{"nibble_time_to_first_token_seconds", "vllm:time_to_first_token_seconds"},
    Alias{"nibble_inter_token_latency_seconds", "vllm:inter_token_latency_seconds"},
    Alias{"nibble_request_duration_seconds", "vllm:e2e_request_latency_seconds"},
    Alias{"nibble_request_queue_duration_seconds", "vllm:request_queue_time_seconds"},
    Alias{"nibble_step_tokens", "vllm:iteration_tokens_total"},
    Alias{"nibble_gateway_request_prompt_tokens", "vllm:request_prompt_tokens"},
    Alias{"nibble_gateway_request_generated_tokens", "vllm:request_generation_tokens"},
};

std::string LabelOf(const ClientMetric& metric, const char* name) {
  const auto found = std::find_if(metric.label.begin(), metric.label.end(),
                                  [name](const auto& label) { return label.name == name; });
  return found == metric.label.end() ? "" : found->value;
}

// vLLM's word for how a request ended.
std::string FinishedReason(const ClientMetric& metric) {
  const std::string finish = LabelOf(metric, "finish_reason");
  if (finish == "stop" || finish == "length") return finish;
  return LabelOf(metric, "code") == "INTERNAL" ? "error" : "abort";
}

// One engine answers a group's port.
Labels VllmLabels(const ClientMetric& metric) {
  return {{"model_name", LabelOf(metric, "model")}, {"engine", "0"}};
}

void AddTo(const ClientMetric& more, ClientMetric* sum) {
  sum->counter.value += more.counter.value;
  sum->gauge.value += more.gauge.value;
  sum->histogram.sample_count += more.histogram.sample_count;
  sum->histogram.sample_sum += more.histogram.sample_sum;
  const size_t buckets = std::min(sum->histogram.bucket.size(), more.histogram.bucket.size());
  for (size_t i = 0; i < buckets; ++i) {
    sum->histogram.bucket[i].cumulative_count += more.histogram.bucket[i].cumulative_count;
  }
}

MetricFamily Renamed(const MetricFamily& own, const Alias& alias) {
  MetricFamily family{.name = alias.vllm, .help = own.help, .type = own.type, .metric = {}};
  for (const ClientMetric& metric : own.metric) {
    ClientMetric renamed = metric;
    renamed.label = VllmLabels(metric);
    if (alias.by_finish) renamed.label.push_back({"finished_reason", FinishedReason(metric)});
    const auto same =
        std::find_if(family.metric.begin(), family.metric.end(),
                     [&](const ClientMetric& other) { return other.label == renamed.label; });
    if (same == family.metric.end()) {
      family.metric.push_back(std::move(renamed));
    } else {
      AddTo(metric, &*same);
    }
  }
  return family;
}

const MetricFamily* Find(const std::vector<MetricFamily>& families, const char* name) {
  const auto found = std::find_if(families.begin(), families.end(),
                                  [name](const auto& family) { return family.name == name; });
  return found == families.end() || found->metric.empty() ? nullptr : &*found;
}

// The KV cache's size, which vLLM tells in labels.
void AddCacheInfo(const std::vector<MetricFamily>& own, std::vector<MetricFamily>* out) {
  const MetricFamily* blocks = Find(own, "nibble_kv_cache_blocks_capacity");
  const MetricFamily* tokens = Find(own, "nibble_kv_cache_block_tokens");
  if (blocks == nullptr || tokens == nullptr) return;
  const auto number = [](const MetricFamily* family) {
    return std::to_string(static_cast<int64_t>(family->metric.front().gauge.value));
  };
  ClientMetric info;
  info.label = VllmLabels(blocks->metric.front());
  info.label.push_back({"block_size", number(tokens)});
  info.label.push_back({"num_gpu_blocks", number(blocks)});
  info.gauge.value = 1;
  out->push_back({.name = "vllm:cache_config_info",
                  .help = "Size of the KV cache.",
                  .type = prometheus::MetricType::Gauge,
                  .metric = {std::move(info)}});
}

}  // namespace

std::vector<MetricFamily> VllmFamilies(const std::vector<MetricFamily>& own) {
  std::vector<MetricFamily> families;
  for (const Alias& alias : kAliases) {
    if (const MetricFamily* found = Find(own, alias.own)) {
      families.push_back(Renamed(*found, alias));
    }
  }
  AddCacheInfo(own, &families);
  return families;
}

}  // namespace nibble
