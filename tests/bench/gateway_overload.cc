// Far more requests than a group can serve: nibble-gateway and a leader over the fake executor as
// two processes, the clients in this one, on loopback. Requests come at a fixed rate whatever
// becomes of those before. What is promised: the group stays busy with work that is finished, the
// rest is refused at once, memory does not grow, and when the load drops everything is as before.
#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "base/check.h"
#include "base/config.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "nibble/inference/v1/inference.grpc.pb.h"
#include "tests/bench/bench_servers.h"
#include "tests/bench/process_usage.h"

namespace nibble::bench {
namespace {

namespace pb = inference::v1;
using SteadyTime = std::chrono::steady_clock::time_point;
using std::chrono::milliseconds;

constexpr int32_t kConnections = 32;
constexpr auto kAfter = std::chrono::seconds(10);

struct Options {
  int32_t seconds = 300;
  int32_t capacity_seconds = 15;
  double factor = 4;
  int32_t slots = 64;
  int32_t tokens = 25;
  Duration step = milliseconds(20);
};

void Declare(ConfigParser* parser, Options* options) {
  parser->Int("seconds", &options->seconds, {1, 36'000}, "Time of overload");
  parser->Int("capacity_seconds", &options->capacity_seconds, {1, 3600},
              "Time over which the capacity is measured before");
  parser->Number("factor", &options->factor, {1, 100}, "Requests a second over the capacity");
  parser->Int("slots", &options->slots, {1, 4096}, "Sequences that the group runs at once");
  parser->Int("tokens", &options->tokens, {1, 4096}, "Tokens of each answer");
  parser->Time("step", &options->step, {milliseconds(1), std::chrono::seconds(10)},
               "Time of a step of the fake executor");
}

struct Outcome {
  grpc::StatusCode code = grpc::StatusCode::OK;
  SteadyTime begun;
  SteadyTime ended;
  float total_ms = 0;
  float first_ms = 0;  // to the first token; 0 = none came
};

// Everything that ended, from all requests.
class Outcomes {
 public:
  void Add(const Outcome& outcome) {
    const absl::MutexLock lock(&mutex_);
    list_.push_back(outcome);
    --running_;
  }
  void Begun() { ++running_; }
  [[nodiscard]] int32_t running() const { return running_; }
  [[nodiscard]] std::vector<Outcome> Take() {
    const absl::MutexLock lock(&mutex_);
    return std::exchange(list_, {});
  }

 private:
  absl::Mutex mutex_;
  std::vector<Outcome> list_;
  std::atomic<int32_t> running_{0};
};

// One request; owns itself until its status.
class Request final : public grpc::ClientReadReactor<pb::GenerateStreamResponse> {
 public:
  Request(Outcomes* outcomes, const std::shared_ptr<grpc::Channel>& channel, int32_t tokens)
      : outcomes_(*outcomes), begun_(std::chrono::steady_clock::now()) {
    outcomes_.Begun();
    context_.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
    request_.mutable_request()->set_text("Once upon a time there was a little girl.");
    request_.mutable_request()->mutable_stopping()->set_max_tokens(static_cast<uint32_t>(tokens));
    request_.mutable_request()->mutable_stopping()->set_ignore_eos(true);
    pb::InferenceService::NewStub(channel)->async()->GenerateStream(&context_, &request_, this);
    StartRead(&response_);
    StartCall();
  }

 private:
  void OnReadDone(bool ok) override {
    if (!ok) return;
    if (first_ms_ == 0 && response_.has_delta()) first_ms_ = Milliseconds();
    StartRead(&response_);
  }
  void OnDone(const grpc::Status& status) override {
    outcomes_.Add({.code = status.error_code(),
                   .begun = begun_,
                   .ended = std::chrono::steady_clock::now(),
                   .total_ms = Milliseconds(),
                   .first_ms = first_ms_});
    delete this;
  }
  [[nodiscard]] float Milliseconds() const {
    return std::chrono::duration<float, std::milli>(std::chrono::steady_clock::now() - begun_)
        .count();
  }

  Outcomes& outcomes_;
  const SteadyTime begun_;
  float first_ms_ = 0;
  grpc::ClientContext context_;
  pb::GenerateStreamRequest request_;
  pb::GenerateStreamResponse response_;
};

class Load {
 public:
  Load(const std::string& address, int32_t tokens) : tokens_(tokens) {
    for (int32_t i = 0; i < kConnections; ++i) {
      grpc::ChannelArguments arguments;
      arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
      channels_.push_back(
          grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments));
    }
  }

  // Always `together` requests, one after another.
  std::vector<Outcome> Closed(int32_t together, std::chrono::seconds time) {
    const SteadyTime until = std::chrono::steady_clock::now() + time;
    while (std::chrono::steady_clock::now() < until) {
      while (outcomes_.running() < together) Begin();
      std::this_thread::sleep_for(milliseconds(1));
    }
    return Drain();
  }

  // `rate` requests a second, come what may; `each_second` is called about once a second. Does not
  // wait for what runs at the end.
  template <typename EachSecond>
  void Open(double rate, std::chrono::seconds time, const EachSecond& each_second) {
    const SteadyTime begin = std::chrono::steady_clock::now();
    const std::chrono::duration<double> gap(1 / rate);
    SteadyTime next_second = begin;
    for (int64_t i = 0;; ++i) {
      const SteadyTime due = begin + std::chrono::duration_cast<std::chrono::nanoseconds>(
                                         gap * static_cast<double>(i));
      if (due - begin >= time) break;
      std::this_thread::sleep_until(due);
      Begin();
      if (due < next_second) continue;
      next_second = due + std::chrono::seconds(1);
      each_second();
    }
  }

  // Of every request since it was last asked for, once nothing runs.
  std::vector<Outcome> Drain() {
    while (outcomes_.running() > 0) std::this_thread::sleep_for(milliseconds(1));
    return outcomes_.Take();
  }

 private:
  void Begin() { new Request(&outcomes_, channels_[begun_++ % channels_.size()], tokens_); }

  const int32_t tokens_;
  std::vector<std::shared_ptr<grpc::Channel>> channels_;
  size_t begun_ = 0;
  Outcomes outcomes_;
};

int64_t Count(const std::vector<Outcome>& outcomes, grpc::StatusCode code) {
  return std::count_if(outcomes.begin(), outcomes.end(),
                       [code](const Outcome& outcome) { return outcome.code == code; });
}

float Quantile(std::vector<float> values, double q) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[std::min(values.size() - 1,
                         static_cast<size_t>(q * static_cast<double>(values.size())))];
}

// Of requests a second that were finished within the time that requests came.
double Rate(const std::vector<Outcome>& outcomes, SteadyTime begin, std::chrono::seconds time) {
  const auto good = std::count_if(outcomes.begin(), outcomes.end(), [&](const Outcome& outcome) {
    return outcome.code == grpc::StatusCode::OK && outcome.ended - begin < time;
  });
  return static_cast<double>(good) / static_cast<double>(time.count());
}

BenchServers StartServers(const Options& options) {
  const auto micros = std::chrono::duration_cast<std::chrono::microseconds>(options.step).count();
  return StartBenchServers({absl::StrCat("--max-sequences=", options.slots),
                            absl::StrCat("--queue-size=", 2 * options.slots),
                            absl::StrCat("--step-base=", micros, "us")},
                           {"--log-level=error"});
}

// Asks whether the gateway lives, fifty times a second: what a call costs on this machine at this
// load that does nothing and waits for nothing.
class Probe {
 public:
  explicit Probe(const std::string& address)
      : stub_(grpc::health::v1::Health::NewStub(
            grpc::CreateChannel(address, grpc::InsecureChannelCredentials()))),
        thread_([this] { Run(); }) {}
  // Of every call so far; ends it.
  std::vector<float> Take() {
    enough_ = true;
    thread_.join();
    return std::move(milliseconds_);
  }

 private:
  void Run() {
    while (!enough_) {
      const SteadyTime begin = std::chrono::steady_clock::now();
      grpc::ClientContext context;
      grpc::health::v1::HealthCheckResponse response;
      CHECK(stub_->Check(&context, grpc::health::v1::HealthCheckRequest(), &response).ok());
      milliseconds_.push_back(
          std::chrono::duration<float, std::milli>(std::chrono::steady_clock::now() - begin)
              .count());
      std::this_thread::sleep_for(milliseconds(20));
    }
  }

  const std::unique_ptr<grpc::health::v1::Health::Stub> stub_;
  std::vector<float> milliseconds_;
  std::atomic<bool> enough_{false};
  std::thread thread_;
};

// One line per bound; false where it does not hold.
bool Bound(const char* what, double value, const char* unit, bool held) {
  std::printf("%-8s %-46s %12.2f %s\n", held ? "held" : "NOT HELD", what, value, unit);
  return held;
}

bool CheckOverload(const Options& options, const std::vector<Outcome>& outcomes, double capacity,
                   double goodput) {
  std::vector<float> refused_ms;
  for (const Outcome& outcome : outcomes) {
    if (outcome.code == grpc::StatusCode::RESOURCE_EXHAUSTED)
      refused_ms.push_back(outcome.total_ms);
  }
  const auto well = Count(outcomes, grpc::StatusCode::OK);
  const auto refused = Count(outcomes, grpc::StatusCode::RESOURCE_EXHAUSTED);
  const auto other = static_cast<int64_t>(outcomes.size()) - well - refused;
  std::printf("%zu requests in %d s: %ld finished, %ld refused\n", outcomes.size(), options.seconds,
              static_cast<long>(well), static_cast<long>(refused));
  bool held = Bound("goodput, share of the capacity", 100 * goodput / capacity, "%",
                    goodput >= 0.9 * capacity);
  held &= Bound("requests that ended otherwise", static_cast<double>(other), "", other == 0);
  const float p99 = Quantile(refused_ms, 0.99);
  held &= Bound("a refusal's time, p50", Quantile(refused_ms, 0.5), "ms", true);
  held &= Bound("a refusal's time, p99 (at most 20)", p99, "ms", p99 <= 20);
  return held;
}

// What the second half grew beyond the first; a few pages are the allocator's.
bool CheckMemory(const char* name, const std::vector<int64_t>& bytes) {
  const size_t half = bytes.size() / 2;
  const auto most = [&](size_t from, size_t to) {
    return *std::max_element(bytes.begin() + static_cast<long>(from),
                             bytes.begin() + static_cast<long>(to));
  };
  const double grown = static_cast<double>(most(half, bytes.size()) - most(0, half)) / (1 << 20);
  return Bound(absl::StrCat(name, " grew from half to half (at most 1)").c_str(), grown, "MiB",
               grown <= 1);
}

// Seconds from the drop of the load to the beginning of the last request that was refused, or
// waited for its first token for longer than `usual_ms`.
double Recovery(const std::vector<Outcome>& after, SteadyTime dropped, float usual_ms) {
  double seconds = 0;
  for (const Outcome& outcome : after) {
    if (outcome.code == grpc::StatusCode::OK && outcome.first_ms <= usual_ms) continue;
    seconds = std::max(seconds, std::chrono::duration<double>(outcome.begun - dropped).count());
  }
  return seconds;
}

int Main(int argc, char** argv) {
  Options options;
  ConfigParser parser({.name = "gateway_overload",
                       .summary = "Sends a group more than it can serve.",
                       .example = "gateway_overload --factor 4 --seconds 300"});
  Declare(&parser, &options);
  if (const auto exit_code = parser.ParseMain(argc, argv)) return *exit_code;
  const BenchServers servers = StartServers(options);
  Load load(servers.gateway->Address("grpc"), options.tokens);

  const std::chrono::seconds measured(options.capacity_seconds);
  SteadyTime begin = std::chrono::steady_clock::now();
  const std::vector<Outcome> alone = load.Closed(options.slots, measured);
  const double capacity = Rate(alone, begin, measured);
  std::vector<float> first_ms;
  for (const Outcome& outcome : alone) first_ms.push_back(outcome.first_ms);
  const float usual = Quantile(first_ms, 0.99);
  std::printf("capacity %.1f requests/s, first token p99 %.1f ms\n", capacity, usual);

  const std::chrono::seconds overload(options.seconds);
  std::vector<int64_t> gateway_bytes;
  std::vector<int64_t> leader_bytes;
  begin = std::chrono::steady_clock::now();
  Probe probe(servers.gateway->Address("grpc"));
  load.Open(options.factor * capacity, overload, [&] {
    gateway_bytes.push_back(RssBytes(servers.gateway->pid()));
    leader_bytes.push_back(RssBytes(servers.leader->pid()));
  });
  const SteadyTime dropped = std::chrono::steady_clock::now();
  const std::vector<float> probes = probe.Take();
  load.Open(capacity / 2, kAfter, [] {});
  std::vector<Outcome> outcomes = load.Drain();
  const auto after =
      std::partition(outcomes.begin(), outcomes.end(),
                     [dropped](const Outcome& outcome) { return outcome.begun < dropped; });
  const double recovered = Recovery({after, outcomes.end()}, dropped, 2 * usual);
  outcomes.erase(after, outcomes.end());

  bool held = CheckOverload(options, outcomes, capacity, Rate(outcomes, begin, overload));
  std::printf("a health check meanwhile: p50 %.2f ms, p99 %.2f ms\n", Quantile(probes, 0.5),
              Quantile(probes, 0.99));
  held &= CheckMemory("gateway", gateway_bytes);
  held &= CheckMemory("leader", leader_bytes);
  held &= Bound("until all is as before (at most 5)", recovered, "s", recovered <= 5);
  std::printf("%s\n", held ? "HELD" : "NOT HELD");
  return held ? 0 : 1;
}

}  // namespace
}  // namespace nibble::bench

int main(int argc, char** argv) { return nibble::bench::Main(argc, argv); }
