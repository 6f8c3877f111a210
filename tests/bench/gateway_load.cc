// Many streams at once through a real gateway: nibble-gateway and a leader over the fake executor
// as two processes, the clients in this one, all on loopback. Every token of every stream is
// checked. The same streams straight at the leader, before, show what is not the gateway's doing.
//
// The leader gives every stream a token per step, all at the same moment, so a gap beyond the
// step's time was added on the way.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/config.h"
#include "base/version.h"
#include "tests/bench/bench_servers.h"
#include "tests/bench/gateway_load_client.h"
#include "tests/bench/process_usage.h"

namespace nibble::bench {
namespace {

using nlohmann::ordered_json;

constexpr auto kRamp = std::chrono::seconds(5);

struct Options {
  int32_t streams = 1000;
  int32_t rate = 20;
  int32_t seconds = 60;
  int32_t direct_seconds = 10;
  int32_t rounds = 1;
  Duration starved = std::chrono::seconds(1);
  int32_t bound_ms = 20;
  bool stalled = false;
  int32_t bad_percent = 0;
  int32_t bound_kib = 64;
  std::string json;
};

void Declare(ConfigParser* parser, Options* options) {
  parser->Int("streams", &options->streams, {1, 100'000}, "Streams at once");
  parser->Int("rate", &options->rate, {1, 1000}, "Tokens a second of each stream");
  parser->Int("seconds", &options->seconds, {1, 3600}, "Time measured");
  parser->Int("direct_seconds", &options->direct_seconds, {0, 3600},
              "Time measured straight at the leader before; 0: not at all");
  parser->Int("rounds", &options->rounds, {1, 100}, "Times everything is done, with new servers");
  parser->Time("starved", &options->starved, {.min = Duration(1)},
               "A stream with a longer gap is starved");
  parser->Int("bound_ms", &options->bound_ms, {1, 10'000}, "What p99 of the added gap may be");
  parser->Bool("stalled", &options->stalled,
               "Clients stop reading after their first token; what they cost is measured alone");
  parser->Int("bad_percent", &options->bad_percent, {0, 90},
              "Share of the streams that reads badly or not at all, in every second round; only "
              "what that costs the others is measured");
  parser->Int("bound_kib", &options->bound_kib, {1, 1 << 20},
              "What a stream may take of the gateway's memory");
  parser->String("json", &options->json, "File for the record; empty: none");
}

// Of one process over the time looked at.
struct Usage {
  pid_t pid = 0;
  int64_t rss_before = 0;  // without any stream
  int64_t rss = 0;
  double cpu_seconds = 0;
};

class UsageMeter final : public LoadObserver {
 public:
  explicit UsageMeter(const std::vector<pid_t>& pids) {
    for (const pid_t pid : pids) usages.push_back({.pid = pid, .rss_before = RssBytes(pid)});
  }
  void OnMeasuring() override {
    begin_ = std::chrono::steady_clock::now();
    for (Usage& usage : usages) usage.cpu_seconds = CpuSeconds(usage.pid);
  }
  void OnMeasured() override {
    seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
    for (Usage& usage : usages) {
      usage.cpu_seconds = CpuSeconds(usage.pid) - usage.cpu_seconds;
      usage.rss = RssBytes(usage.pid);
    }
  }

  std::vector<Usage> usages;
  double seconds = 0;

 private:
  std::chrono::steady_clock::time_point begin_;
};

struct Result {
  LoadReport load;
  std::vector<Usage> usages;
  double seconds = 0;
  std::vector<float> added_ms;  // sorted: gaps beyond a step
  int32_t starved = 0;
};

float Quantile(const std::vector<float>& sorted, double q) {
  if (sorted.empty()) return 0;
  return sorted[std::min(sorted.size() - 1,
                         static_cast<size_t>(q * static_cast<double>(sorted.size())))];
}

Result Measure(const Options& options, const std::string& address, bool gateway, int32_t seconds,
               const std::vector<pid_t>& pids, int32_t bad_percent = 0) {
  UsageMeter meter(pids);
  const auto whole = std::chrono::duration_cast<std::chrono::seconds>(kRamp).count() + seconds;
  LoadPlan plan = {.address = address,
                   .gateway = gateway,
                   .streams = options.streams,
                   // The first stream has to outlast the ramp and the time looked at.
                   .tokens = static_cast<int32_t>(whole + 2) * options.rate,
                   .vocab_size = kBenchVocab,
                   .ramp = kRamp,
                   .measured = std::chrono::seconds(seconds),
                   // Streams that nobody reads end only so.
                   .limit = std::chrono::seconds(options.stalled ? whole + 20 : 3 * whole + 60),
                   .stalled = options.stalled,
                   .bad_percent = bad_percent};
  Result result;
  result.load = RunLoad(plan, &meter);
  result.usages = meter.usages;
  result.seconds = meter.seconds;
  const float step_ms = 1000.0F / static_cast<float>(options.rate);
  for (const float gap : result.load.gaps_ms) {
    result.added_ms.push_back(std::max(0.0F, gap - step_ms));
  }
  std::sort(result.added_ms.begin(), result.added_ms.end());
  const float starved_ms = std::chrono::duration<float, std::milli>(options.starved).count();
  for (const float longest : result.load.longest_ms) result.starved += longest > starved_ms;
  return result;
}

double MicrosPerToken(const Usage& usage, const Result& result) {
  return usage.cpu_seconds * 1e6 / static_cast<double>(std::max<int64_t>(1, result.load.tokens));
}

using Figures = std::vector<std::pair<std::string, double>>;

Figures Describe(const Result& result, const std::vector<std::string>& names) {
  Figures figures;
  const auto add = [&figures](std::string name, double value) {
    figures.emplace_back(std::move(name), value);
  };
  add("tokens_per_second", static_cast<double>(result.load.tokens) / result.seconds);
  add("errors", result.load.errors);
  add("streams_with_a_token", result.load.speaking);
  add("streams_starved", result.starved);
  for (const auto& [name, q] : {std::pair{"p50", 0.5}, {"p99", 0.99}, {"p999", 0.999}}) {
    add(absl::StrCat("added_gap_ms_", name), Quantile(result.added_ms, q));
  }
  add("added_gap_ms_max", Quantile(result.added_ms, 1));
  for (size_t i = 0; i < names.size(); ++i) {
    const Usage& usage = result.usages[i];
    add(names[i] + "_cpu_us_per_token", MicrosPerToken(usage, result));
    add(names[i] + "_cores", usage.cpu_seconds / result.seconds);
    if (usage.pid == ::getpid()) continue;  // it keeps every gap
    const auto streams = static_cast<double>(std::max<size_t>(1, result.load.longest_ms.size()));
    add(names[i] + "_rss_kib_per_stream",
        static_cast<double>(usage.rss - usage.rss_before) / 1024 / streams);
  }
  return figures;
}

double Rounded(double value) { return std::round(value * 1000) / 1000; }

// The values of every round, as one record per metric.
class Records {
 public:
  void Add(const std::string& setting, int32_t seconds, const Figures& figures) {
    for (const auto& [name, value] : figures) {
      const auto same = [&, metric = name](const Entry& entry) {
        return entry.setting == setting && entry.metric == metric;
      };
      auto entry = std::find_if(entries_.begin(), entries_.end(), same);
      if (entry == entries_.end()) {
        entry = entries_.insert(entry, {.setting = setting, .metric = name, .seconds = seconds});
      }
      entry->values.push_back(Rounded(value));
    }
  }
  [[nodiscard]] ordered_json ToJson(const Options& options) const {
    ordered_json records = ordered_json::array();
    for (const Entry& entry : entries_) {
      std::vector<double> sorted = entry.values;
      std::sort(sorted.begin(), sorted.end());
      records.push_back({{"metric", entry.metric},
                         {"value", sorted[sorted.size() / 2]},
                         {"streams", options.streams},
                         {"rate", options.rate},
                         {"seconds", entry.seconds},
                         {"runs", sorted.size()},
                         {"spread", Rounded(sorted.back() - sorted.front())},
                         {"values", entry.values},
                         {"setting", entry.setting},
                         {"version", std::string(GetBuildInfo().version)}});
    }
    return records;
  }

 private:
  struct Entry {
    std::string setting, metric;
    int32_t seconds = 0;
    std::vector<double> values = {};
  };
  std::vector<Entry> entries_;
};

void Print(const char* title, const Result& result, const std::vector<std::string>& names) {
  std::printf("\n%s, %.1f s\n", title, result.seconds);
  for (const auto& [name, value] : Describe(result, names)) {
    std::printf("  %-32s %12.2f\n", name.c_str(), value);
  }
  if (result.load.errors > 0) std::printf("  first error: %s\n", result.load.first_error.c_str());
  std::fflush(stdout);
}

BenchServers StartServers(const Options& options) {
  const auto flag = [](const char* name, int64_t value) {
    return absl::StrCat("--", name, "=", value);
  };
  // Of all streams' prompts within a second or so.
  const int32_t prompts = std::max(1024, 20 * options.streams / options.rate);
  const int32_t context = 64 + (options.seconds + options.direct_seconds + 10) * options.rate;
  return StartBenchServers(
      {flag("context", context), flag("max-sequences", options.streams),
       flag("queue-size", options.streams), flag("max-step-tokens", options.streams + prompts),
       flag("kv-blocks", int64_t{options.streams} * (context / 16 + 2) * 10 / 9),
       absl::StrCat("--step-base=", 1'000'000 / options.rate, "us")},
      {"--log-level=warn", "--stall-timeout=1h", flag("max-concurrency", options.streams + 16)});
}

// One round. True when every bound held.
bool RunRound(const Options& options, Records* records) {
  const BenchServers servers = StartServers(options);
  const pid_t leader = servers.leader->pid();
  if (options.direct_seconds > 0) {
    const std::vector<std::string> names = {"leader", "client"};
    const Result direct = Measure(options, servers.leader->Address("grpc"), /*gateway=*/false,
                                  options.direct_seconds, {leader, ::getpid()});
    Print("Straight at the leader", direct, names);
    records->Add("straight at the leader", options.direct_seconds, Describe(direct, names));
  }
  const std::vector<std::string> names = {"gateway", "leader", "client"};
  const Result result = Measure(options, servers.gateway->Address("grpc"), /*gateway=*/true,
                                options.seconds, {servers.gateway->pid(), leader, ::getpid()});
  Print("Through the gateway", result, names);
  records->Add(options.stalled ? "stalled" : "through the gateway", options.seconds,
               Describe(result, names));
  const double each = static_cast<double>(result.usages[0].rss - result.usages[0].rss_before) /
                      1024 / options.streams;
  if (options.stalled) {  // each of them, and not some that were refused
    return result.load.speaking == options.streams && each <= options.bound_kib;
  }
  return result.load.errors == 0 && result.starved == 0 && each <= options.bound_kib &&
         Quantile(result.added_ms, 0.99) <= static_cast<float>(options.bound_ms);
}

float Median(std::vector<float> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// The same streams with and without bad readers among them, by turns, against the same servers.
// True when those who read well do not feel the others: p99 of their gaps, medians of the rounds,
// differs by at most a twentieth.
bool CompareReaders(const Options& options) {
  const BenchServers servers = StartServers(options);
  const float step_ms = 1000.0F / static_cast<float>(options.rate);
  std::vector<float> alone;
  std::vector<float> beside;
  int32_t errors = 0;
  for (int32_t round = 0; round < options.rounds; ++round) {
    for (auto* p99s : {&alone, &beside}) {
      const int32_t bad = p99s == &alone ? 0 : options.bad_percent;
      const Result result = Measure(options, servers.gateway->Address("grpc"), /*gateway=*/true,
                                    options.seconds, {servers.gateway->pid(), ::getpid()}, bad);
      p99s->push_back(step_ms + Quantile(result.added_ms, 0.99));
      errors += result.load.errors;
      std::printf(
          "%2d %% read badly: gap p50 %6.2f ms, p99 %6.2f ms, p99.9 %6.2f ms of %zu streams\n", bad,
          step_ms + Quantile(result.added_ms, 0.5), p99s->back(),
          step_ms + Quantile(result.added_ms, 0.999), result.load.longest_ms.size());
      std::fflush(stdout);
    }
  }
  const float change = 100 * (Median(beside) / Median(alone) - 1);
  const bool held = errors == 0 && change <= 5;
  std::printf(
      "%s: p99 of a gap, beside bad readers against alone: %+.1f %% (at most 5), %d errors\n",
      held ? "HELD" : "NOT HELD", change, errors);
  return held;
}

int Main(int argc, char** argv) {
  Options options;
  ConfigParser parser({.name = "gateway_load",
                       .summary = "Measures what a gateway adds to many streams at once.",
                       .example = "gateway_load --json gateway.json"});
  Declare(&parser, &options);
  if (const auto exit_code = parser.ParseMain(argc, argv)) return *exit_code;
  if (options.bad_percent > 0) return CompareReaders(options) ? 0 : 1;
  Records records;
  bool good = true;
  for (int32_t round = 0; round < options.rounds; ++round) {
    good = RunRound(options, &records) && good;
  }
  if (!options.json.empty()) {
    std::ofstream(options.json) << records.ToJson(options).dump(1) << "\n";
  }
  if (options.stalled) {
    std::printf("\n%s: every stream had a token, at most %d KiB each\n", good ? "HELD" : "NOT HELD",
                options.bound_kib);
    return good ? 0 : 1;
  }
  std::printf("\n%s: 0 errors, 0 streams starved, p99 of the added gap <= %d ms, %d KiB a stream\n",
              good ? "HELD" : "NOT HELD", options.bound_ms, options.bound_kib);
  return good ? 0 : 1;
}

}  // namespace
}  // namespace nibble::bench

int main(int argc, char** argv) { return nibble::bench::Main(argc, argv); }
