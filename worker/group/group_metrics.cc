#include "worker/group/group_metrics.h"

#include <algorithm>
#include <array>
#include <chrono>

#include "absl/strings/str_cat.h"
#include "base/metric_families.h"
#include "base/version.h"
#include "worker/step/step_plan.h"

namespace nibble::group {
namespace {

using prometheus::MetricType;

constexpr std::array<const char*, step::kStepKinds> kStepKindNames = {"prefill", "decode", "mixed"};
constexpr std::array<const char*, step::kRejectReasons> kRejectReasonNames = {
    "queue_full", "queue_timeout", "draining", "too_long", "invalid"};

// Monotonic stamps mean nothing outside this machine, so the wall clock's is exported.
double UnixSeconds(int64_t monotonic_ns, const Clock& clock) {
  if (monotonic_ns == 0) return 0;
  const Duration age = clock.Now() - Deadline(Duration(monotonic_ns));
  const auto wall = std::chrono::system_clock::now().time_since_epoch() - age;
  return std::chrono::duration<double>(wall).count();
}

void AddState(const step::EngineStats& engine, const Clock& clock, MetricFamilies* out) {
  out->Begin("nibble_requests_running", "Sequences that have a slot.", MetricType::Gauge);
  out->Add(engine.requests_running);
  out->Begin("nibble_requests_waiting", "Requests that wait for a slot.", MetricType::Gauge);
  out->Add(engine.requests_waiting, {{"reason", "capacity"}});
  out->Begin("nibble_waiting_prompt_tokens", "Prompt tokens of the requests that wait.",
             MetricType::Gauge);
  out->Add(engine.waiting_prompt_tokens);
  out->Begin("nibble_slots_used", "Slots taken by sequences.", MetricType::Gauge);
  out->Add(engine.slots_used);
  out->Begin("nibble_steps_in_flight", "Steps launched and not yet waited for.", MetricType::Gauge);
  out->Add(engine.steps_in_flight);
  out->Begin("nibble_engine_last_step_timestamp_seconds",
             "When the last step retired, in seconds of the Unix epoch; 0 before the first.",
             MetricType::Gauge);
  out->AddGauge(UnixSeconds(engine.last_step_ns.Get(), clock));
  out->Begin("nibble_draining", "1 while the group finishes what it has and takes nothing new.",
             MetricType::Gauge);
  out->Add(engine.draining);
  out->Begin("nibble_model_ready", "1 while the group takes requests.", MetricType::Gauge);
  out->Add(engine.ready);
}

void AddKvCache(const step::EngineStats& engine, MetricFamilies* out) {
  out->Begin("nibble_kv_cache_blocks", "KV blocks by state.", MetricType::Gauge);
  out->Add(engine.kv_blocks_used, {{"state", "used"}});
  out->Add(engine.kv_blocks_free, {{"state", "free"}});
  out->Add(engine.kv_blocks_cached, {{"state", "cached"}});
  out->Add(engine.kv_blocks_quarantined, {{"state", "quarantined"}});
  out->Begin("nibble_kv_cache_blocks_capacity", "KV blocks in all.", MetricType::Gauge);
  out->Add(engine.kv_blocks_total);
  out->Begin("nibble_kv_cache_block_tokens", "Positions in one KV block.", MetricType::Gauge);
  out->AddGauge(step::kBlockTokens);
  const auto total = static_cast<double>(std::max<int64_t>(1, engine.kv_blocks_total.Get()));
  out->Begin("nibble_kv_cache_usage_ratio", "Share of KV blocks that are used.", MetricType::Gauge);
  out->AddGauge(static_cast<double>(engine.kv_blocks_used.Get()) / total);
}

void AddThroughput(const step::EngineStats& engine, MetricFamilies* out) {
  out->Begin("nibble_prompt_tokens_total", "Prompt tokens processed.", MetricType::Counter);
  out->Add(engine.prompt_tokens, {{"source", "computed"}});
  out->Add(engine.cached_prompt_tokens, {{"source", "cached"}});
  out->Begin("nibble_prefix_cache_queried_tokens_total",
             "Prompt tokens looked for among cached prefixes.", MetricType::Counter);
  out->Add(engine.prefix_queried_tokens);
  out->Begin("nibble_prefix_cache_hit_tokens_total",
             "Prompt tokens found among cached prefixes and not computed.", MetricType::Counter);
  out->Add(engine.prefix_hit_tokens);
  out->Begin("nibble_generated_tokens_total", "Tokens delivered.", MetricType::Counter);
  out->Add(engine.generated_tokens);
  out->Begin("nibble_preemptions_total", "Sequences that lost their blocks to others.",
             MetricType::Counter);
  out->Add(engine.preemptions);
  out->Begin("nibble_nonfinite_logits_total", "Rows whose logits were not finite.",
             MetricType::Counter);
  out->Add(engine.nonfinite_rows);
  out->Begin("nibble_engine_steps_total", "Steps by what they did.", MetricType::Counter);
  for (size_t kind = 0; kind < engine.steps.size(); ++kind) {
    out->Add(engine.steps[kind], {{"kind", kStepKindNames[kind]}});
  }
  out->Begin("nibble_step_duration_seconds", "Time from a step's launch to its result.",
             MetricType::Histogram);
  for (size_t kind = 0; kind < engine.step_seconds.size(); ++kind) {
    out->Add(engine.step_seconds[kind], step::kStepSecondsBounds, {{"kind", kStepKindNames[kind]}});
  }
  out->Begin("nibble_step_tokens", "Input tokens of a step.", MetricType::Histogram);
  out->Add(engine.step_tokens, step::kStepTokensBounds);
}

void AddRequests(const step::EngineStats& engine, MetricFamilies* out) {
  out->Begin("nibble_requests_total", "Admitted requests by how they ended.", MetricType::Counter);
  out->Add(engine.requests_finished_stop, {{"code", "OK"}, {"finish_reason", "stop"}});
  out->Add(engine.requests_finished_length, {{"code", "OK"}, {"finish_reason", "length"}});
  out->Add(engine.requests_cancelled, {{"code", "CANCELLED"}, {"finish_reason", "none"}});
  out->Add(engine.requests_expired, {{"code", "DEADLINE_EXCEEDED"}, {"finish_reason", "none"}});
  out->Add(engine.requests_failed, {{"code", "INTERNAL"}, {"finish_reason", "none"}});
  out->Begin("nibble_requests_rejected_total", "Requests refused by reason.", MetricType::Counter);
  for (size_t reason = 0; reason < engine.rejected.size(); ++reason) {
    out->Add(engine.rejected[reason], {{"reason", kRejectReasonNames[reason]}});
  }
  out->Begin("nibble_time_to_first_token_seconds", "From arrival to the first token.",
             MetricType::Histogram);
  out->Add(engine.time_to_first_token, step::kTtftSecondsBounds);
  out->Begin("nibble_inter_token_latency_seconds", "Between two tokens of a sequence.",
             MetricType::Histogram);
  out->Add(engine.inter_token, step::kInterTokenSecondsBounds);
  out->Begin("nibble_request_duration_seconds", "From arrival to the end.", MetricType::Histogram);
  out->Add(engine.request_seconds, step::kRequestSecondsBounds);
  out->Begin("nibble_request_queue_duration_seconds", "From arrival to a slot.",
             MetricType::Histogram);
  out->Add(engine.queue_seconds, step::kTtftSecondsBounds);
}

// One owner of memory: its label, what the rank holds and what the plan foresaw.
struct MemoryKind {
  const char* name;
  Gauge step::RankStats::*actual;
  Gauge step::RankStats::*planned;
};
constexpr std::array<MemoryKind, 4> kMemoryKinds = {
    {{"weights", &step::RankStats::weights_bytes, &step::RankStats::weights_planned_bytes},
     {"kv_cache", &step::RankStats::kv_cache_bytes, &step::RankStats::kv_cache_planned_bytes},
     {"activations", &step::RankStats::activations_bytes,
      &step::RankStats::activations_planned_bytes},
     {"workspace", &step::RankStats::workspace_bytes, &step::RankStats::workspace_planned_bytes}}};
constexpr MemoryKind kGraphs = {"graphs", &step::RankStats::graphs_bytes,
                                &step::RankStats::graphs_planned_bytes};
// Taken when the rank had opened its GPU, by its own context and by others: nobody planned it.
constexpr MemoryKind kContext = {"context", &step::RankStats::context_bytes, nullptr};
constexpr const char* kCpu = "cpu";

// The ranks of this machine, each with the text of its label.
template <typename Visit>
void ForEachRank(const step::GroupStats& stats, const GroupFacts& facts, const Visit& visit) {
  const int32_t count = facts.ranks.count > 0 ? facts.ranks.count : facts.tensor_parallel;
  const int32_t end = std::min(facts.ranks.first + count, step::kMaxRanks);
  for (int32_t rank = facts.ranks.first; rank < end; ++rank) {
    visit(stats.ranks[static_cast<size_t>(rank)], absl::StrCat(rank));
  }
}

void AddMemory(const step::GroupStats& stats, const GroupFacts& facts,
               Gauge step::RankStats::*MemoryKind::*which, MetricFamilies* out) {
  ForEachRank(stats, facts, [&](const step::RankStats& rank, const std::string& name) {
    const auto add = [&](const MemoryKind& kind) {
      out->Add(rank.*(kind.*which),
               {{"device", facts.device}, {"rank", name}, {"kind", kind.name}});
    };
    for (const MemoryKind& kind : kMemoryKinds) add(kind);
    if (facts.device == kCpu) return;
    add(kGraphs);
    if (which == &MemoryKind::actual) add(kContext);
  });
}

void AddRanks(const step::GroupStats& stats, const GroupFacts& facts, MetricFamilies* out) {
  out->Begin("nibble_memory_bytes", "Bytes that a rank holds, by owner.", MetricType::Gauge);
  AddMemory(stats, facts, &MemoryKind::actual, out);
  out->Begin("nibble_memory_planned_bytes", "Bytes that the memory plan foresaw, by owner.",
             MetricType::Gauge);
  AddMemory(stats, facts, &MemoryKind::planned, out);
  out->Begin("nibble_rank_up", "1 while the rank runs steps.", MetricType::Gauge);
  ForEachRank(stats, facts, [out](const step::RankStats& rank, const std::string& name) {
    out->Add(rank.up, {{"rank", name}});
  });
  out->Begin("nibble_rank_steps_total", "Steps the rank has run.", MetricType::Counter);
  ForEachRank(stats, facts, [out](const step::RankStats& rank, const std::string& name) {
    out->AddCounter(static_cast<double>(rank.steps.Get()), {{"rank", name}});
  });
  out->Begin("nibble_collective_bytes_total", "Bytes the rank gave to collectives.",
             MetricType::Counter);
  ForEachRank(stats, facts, [out](const step::RankStats& rank, const std::string& name) {
    out->Add(rank.collective_bytes, {{"rank", name}});
  });
  out->Begin("nibble_startup_duration_seconds", "Time to start, by phase.", MetricType::Gauge);
  ForEachRank(stats, facts, [out](const step::RankStats& rank, const std::string& name) {
    out->AddGauge(static_cast<double>(rank.startup_load_ns.Get()) / 1e9,
                  {{"rank", name}, {"phase", "load"}});
  });
}

void AddInfo(const GroupFacts& facts, MetricFamilies* out) {
  out->Begin("nibble_model_info", "What is served.", MetricType::Gauge);
  out->AddGauge(1, {{"architecture", facts.architecture},
                    {"quant", facts.quantization},
                    {"group_size", absl::StrCat(facts.group_size)},
                    {"tp", absl::StrCat(facts.tensor_parallel)},
                    {"numerics", facts.numerics},
                    {"head", facts.head},
                    {"max_context", absl::StrCat(facts.max_context)}});
  const BuildInfo& build = GetBuildInfo();
  out->Begin("nibble_build_info", "Which build this is.", MetricType::Gauge);
  out->AddGauge(1, {{"version", std::string(build.version)},
                    {"git", std::string(build.git_revision)},
                    {"compiler", std::string(build.compiler)}});
}

}  // namespace

std::vector<prometheus::MetricFamily> GroupMetrics::Collect() const {
  MetricFamilies families({{"model", facts_.model}});
  if (facts_.ranks.first == 0) {
    AddState(stats_->engine, *clock_, &families);
    AddKvCache(stats_->engine, &families);
    AddThroughput(stats_->engine, &families);
    AddRequests(stats_->engine, &families);
  }
  AddRanks(*stats_, facts_, &families);
  AddInfo(facts_, &families);
  return families.Take();
}

}  // namespace nibble::group
