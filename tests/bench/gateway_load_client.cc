#include "tests/bench/gateway_load_client.h"

#include <grpcpp/alarm.h>
#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "nibble/inference/v1/inference.grpc.pb.h"
#include "nibble/worker/v1/worker.grpc.pb.h"
#include "tests/support/fake_executor.h"

namespace nibble::bench {
namespace {

namespace pb = inference::v1;
namespace wire = worker::v1;

constexpr int kSmallWindow = 1 << 10;
constexpr char kPrompt[] = "Once upon a time there was a little girl.";

Deadline Now() { return Deadline(std::chrono::steady_clock::now().time_since_epoch()); }

enum class Reading {
  kEager,
  kSlow,  // an event a second
  kDead,  // nothing after the first token
};
constexpr auto kSlowPause = std::chrono::seconds(1);
// Bad readers end with their deadline, this long after the others.
constexpr auto kBadLonger = std::chrono::seconds(4);

// Spread evenly over all streams.
Reading ReadingOf(const LoadPlan& plan, int32_t stream) {
  if (plan.stalled) return Reading::kDead;
  const int32_t bad = (stream + 1) * plan.bad_percent / 100;
  if (bad == stream * plan.bad_percent / 100) return Reading::kEager;
  return bad % 2 == 0 ? Reading::kDead : Reading::kSlow;
}

// What all streams share.
struct Shared {
  LoadPlan plan;
  std::atomic<bool> measuring{false};
  std::atomic<int32_t> speaking{0};  // streams that have had a token
  std::atomic<int32_t> running{0};

  absl::Mutex mutex;
  LoadReport report ABSL_GUARDED_BY(mutex);
};

// One stream's tokens as they come. Called by one thread at a time.
class TokenLog {
 public:
  TokenLog(Shared* shared, uint64_t seed) : shared_(*shared), seed_(seed) {
    gaps_ms_.reserve(static_cast<size_t>(shared->plan.tokens));
  }

  template <typename Ids>
  void OnTokens(const Ids& ids) {
    if (ids.empty()) return;
    const Deadline now = Now();
    for (const auto id : ids) {
      const int32_t expected = testing::FakeToken(seed_, next_, shared_.plan.vocab_size);
      right_ = right_ && static_cast<int32_t>(id) == expected;
      ++next_;
    }
    if (last_ == Deadline()) {
      ++shared_.speaking;
    } else if (shared_.measuring.load(std::memory_order_relaxed)) {
      gaps_ms_.push_back(std::chrono::duration<float, std::milli>(now - last_).count());
      gaps_ms_.insert(gaps_ms_.end(), static_cast<size_t>(ids.size()) - 1, 0.0F);
    }
    last_ = now;
  }

  // A bad reader's end says nothing.
  void OnBadEnd() { --shared_.running; }
  void OnEnd(const grpc::Status& status) {
    absl::MutexLock lock(&shared_.mutex);
    LoadReport& report = shared_.report;
    const bool good = status.ok() && right_ && next_ == shared_.plan.tokens;
    if (!good && report.errors++ == 0) {
      report.first_error =
          absl::StrCat("status ", status.error_code(), " \"", status.error_message(), "\", ", next_,
                       " tokens, ", right_ ? "right" : "wrong");
    }
    report.tokens += static_cast<int64_t>(gaps_ms_.size());
    float longest = 0;
    for (const float gap : gaps_ms_) longest = std::max(longest, gap);
    report.longest_ms.push_back(longest);
    report.gaps_ms.insert(report.gaps_ms.end(), gaps_ms_.begin(), gaps_ms_.end());
    --shared_.running;
  }

 private:
  Shared& shared_;
  const uint64_t seed_;
  int32_t next_ = 0;
  bool right_ = true;
  Deadline last_{};
  std::vector<float> gaps_ms_;
};

const auto& TokensOf(const pb::GenerateStreamResponse& event) { return event.delta().token_ids(); }
const auto& TokensOf(const wire::GenerateResponse& event) { return event.tokens().ids(); }

// Owns itself until its status.
template <typename Response>
class Reader final : public grpc::ClientReadReactor<Response> {
 public:
  Reader(Shared* shared, uint64_t seed, Reading reading)
      : shared_(*shared), reading_(reading), log_(shared, seed) {
    const LoadPlan& plan = shared->plan;
    const bool ends_itself = reading == Reading::kEager || plan.stalled;
    context_.set_deadline(std::chrono::system_clock::now() +
                          (ends_itself ? plan.limit : plan.ramp + plan.measured + kBadLonger));
  }
  grpc::ClientContext* context() { return &context_; }
  void Begin() {
    this->StartRead(&response_);
    this->StartCall();
  }

 private:
  void OnReadDone(bool ok) override {
    if (!ok) return;
    log_.OnTokens(TokensOf(response_));
    if (reading_ == Reading::kEager || TokensOf(response_).empty()) {
      this->StartRead(&response_);
    } else if (reading_ == Reading::kSlow) {
      this->AddHold();
      pause_.Set(std::chrono::system_clock::now() + kSlowPause, [this](bool) {
        this->StartRead(&response_);
        this->RemoveHold();
      });
    }
  }
  void OnDone(const grpc::Status& status) override {
    if (reading_ == Reading::kEager || shared_.plan.stalled) {
      log_.OnEnd(status);
    } else {
      log_.OnBadEnd();
    }
    delete this;
  }

  Shared& shared_;
  const Reading reading_;
  grpc::Alarm pause_;
  TokenLog log_;
  grpc::ClientContext context_;
  Response response_;
};

std::shared_ptr<grpc::Channel> NewChannel(const std::string& address, bool small_window) {
  grpc::ChannelArguments arguments;
  if (small_window) {
    arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, kSmallWindow);
    arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  }
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
}

void BeginAtGateway(Shared* shared, const std::shared_ptr<grpc::Channel>& channel, uint64_t seed,
                    Reading reading) {
  pb::GenerateStreamRequest request;
  request.mutable_request()->set_text(kPrompt);
  request.mutable_request()->mutable_sampling()->set_seed(seed);
  request.mutable_request()->mutable_output()->set_token_ids(true);
  pb::StoppingCriteria* stopping = request.mutable_request()->mutable_stopping();
  stopping->set_max_tokens(static_cast<uint32_t>(shared->plan.tokens));
  stopping->set_ignore_eos(true);
  auto* reader = new Reader<pb::GenerateStreamResponse>(shared, seed, reading);
  pb::InferenceService::NewStub(channel)->async()->GenerateStream(reader->context(), &request,
                                                                  reader);
  reader->Begin();
}

void BeginAtLeader(Shared* shared, const std::shared_ptr<grpc::Channel>& channel, uint64_t seed,
                   Reading reading) {
  wire::GenerateRequest request;
  request.set_request_id(absl::StrCat("load-", seed));
  for (uint32_t i = 0; i < 16; ++i) request.add_prompt_token_ids(i);
  request.set_seed(seed);
  request.set_max_tokens(static_cast<uint32_t>(shared->plan.tokens));
  request.mutable_sampling()->set_top_p(1);
  request.mutable_sampling()->set_typical_p(1);
  request.mutable_sampling()->set_repetition_penalty(1);
  auto* reader = new Reader<wire::GenerateResponse>(shared, seed, reading);
  wire::WorkerService::NewStub(channel)->async()->Generate(reader->context(), &request, reader);
  reader->Begin();
}

}  // namespace

LoadReport RunLoad(const LoadPlan& plan, LoadObserver* observer) {
  Shared shared;
  shared.plan = plan;
  shared.running = plan.streams;
  const Deadline begin = Now();
  const auto passed = [&] { return Now() - begin >= plan.limit; };
  std::shared_ptr<grpc::Channel> channels[2];  // of eager readers, of bad ones
  int32_t begun[2] = {0, 0};
  for (int32_t i = 0; i < plan.streams; ++i) {
    std::this_thread::sleep_until(std::chrono::steady_clock::time_point(
        begin.time_since_epoch() + plan.ramp * i / plan.streams));
    const Reading reading = ReadingOf(plan, i);
    const int bad = reading == Reading::kEager ? 0 : 1;
    if (begun[bad]++ % plan.per_connection == 0) {
      channels[bad] = NewChannel(plan.address, /*small_window=*/bad != 0);
    }
    (plan.gateway ? BeginAtGateway : BeginAtLeader)(&shared, channels[bad],
                                                    static_cast<uint64_t>(i) + 1, reading);
  }
  const auto nap = [] { std::this_thread::sleep_for(std::chrono::milliseconds(5)); };
  while (shared.speaking < plan.streams && shared.running > 0 && !passed()) nap();
  const int32_t speaking = shared.speaking;
  observer->OnMeasuring();
  shared.measuring = true;
  const Deadline until = Now() + plan.measured;
  while (Now() < until && shared.running > 0) nap();
  shared.measuring = false;
  observer->OnMeasured();
  while (shared.running > 0) nap();  // each has a deadline
  absl::MutexLock lock(&shared.mutex);
  shared.report.speaking = speaking;
  return std::move(shared.report);
}

}  // namespace nibble::bench
