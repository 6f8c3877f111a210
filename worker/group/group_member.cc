#include "worker/group/group_member.h"

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/create_channel.h>

#include <algorithm>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "base/exit_codes.h"
#include "base/grpc_status.h"
#include "base/logging.h"
#include "base/status.h"
#include "nibble/worker/v1/group.grpc.pb.h"
#include "worker/group/plan_relay.h"
#include "worker/group/rank_mirror.h"

namespace nibble::group {
namespace {

namespace v1 = worker::v1;

constexpr int kMessageBytesMax = 8 << 20;  // a plan is at most 4 MiB
constexpr int kReconnectMaxMs = 1000;
constexpr Duration kAttempt = std::chrono::milliseconds(250);
constexpr Duration kTick = std::chrono::milliseconds(50);

std::shared_ptr<grpc::Channel> MakeChannel(const GroupMemberOptions& options) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMessageBytesMax);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS,
                   static_cast<int>(kAttempt.count() / 1'000'000));
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, kReconnectMaxMs);
  // The first machine's name may appear in DNS only once its pod runs.
  arguments.SetInt(GRPC_ARG_DNS_MIN_TIME_BETWEEN_RESOLUTIONS_MS, kReconnectMaxMs);
  // Names inside a cluster are never a proxy's.
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  return grpc::CreateCustomChannel(options.leader, options.credentials, arguments);
}

class Member final : public MachineLink {
 public:
  Member(const GroupMemberOptions& options, const std::shared_ptr<grpc::Channel>& channel)
      : options_(options),
        silence_(options.silence_max),
        deliverer_(options.plans),
        heard_at_(options_.clock->Now()),
        stub_(v1::GroupService::NewStub(channel)),
        stream_(stub_->Join(&context_)) {
    reader_ = std::thread([this] { Read(); });
  }

  ~Member() override {
    {
      const absl::MutexLock lock(&mutex_);
      closed_ = true;
    }
    context_.TryCancel();
    if (writer_.joinable()) writer_.join();
    reader_.join();
  }

  // OK once the first machine has welcomed this one.
  absl::Status AwaitWelcome(Deadline deadline) {
    const absl::MutexLock lock(&mutex_);
    const auto answered = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      return welcome_.has_value() || closed_;
    };
    while (!mutex_.AwaitWithTimeout(absl::Condition(&answered), absl::FromChrono(kTick))) {
      if (options_.give_up()) return absl::CancelledError("stopped while joining");
      if (options_.clock->Now() >= deadline) return absl::UnavailableError("no answer");
    }
    if (welcome_.has_value()) return absl::OkStatus();
    return status_.ok() ? absl::UnavailableError("the connection was closed") : status_;
  }

  void StartBeats() {
    Rendezvous& rendezvous = options_.control->rendezvous;
    {
      const absl::MutexLock lock(&mutex_);
      rendezvous.host.Set(welcome_->store_host());
      rendezvous.port = welcome_->store_port();
      rendezvous.key = welcome_->store_key();
    }
    writer_ = std::thread([this] { Write(); });
  }

  bool Joined() const override { return true; }

  std::optional<GroupEnd> Lost(Deadline now) override {
    const absl::MutexLock lock(&mutex_);
    silence_.Observe(now);
    if (stopped_) return std::nullopt;  // every rank has been told to leave
    if (end_.has_value()) return end_;
    if (closed_) {
      return EndBecauseOf(0, kExitRankLost,
                          absl::StrCat("its connection is lost: ", std::string(status_.message())));
    }
    if (!silence_.TooLong(now, heard_at_)) return std::nullopt;
    return EndBecauseOf(
        0, kExitRankLost,
        absl::StrCat("nothing heard of it for ",
                     absl::ToInt64Milliseconds(absl::FromChrono(silence_.limit())), " ms"));
  }

  bool DrainAsked() const override {
    const absl::MutexLock lock(&mutex_);
    return drain_asked_;
  }

  void Drain() override {
    const absl::MutexLock lock(&mutex_);
    draining_ = true;
  }

  void End(const GroupEnd& end, Duration patience) override {
    const absl::MutexLock lock(&mutex_);
    own_end_ = end;
    // The first machine closes the stream once it has read that.
    mutex_.AwaitWithTimeout(absl::Condition(&closed_), absl::FromChrono(patience));
  }

 private:
  // Says Hello, then reads until the stream ends. A thread of its own.
  void Read() {
    v1::JoinRequest hello;
    hello.mutable_hello()->set_index(static_cast<uint32_t>(options_.place.index));
    hello.mutable_hello()->set_group_size(static_cast<uint32_t>(options_.place.machines));
    FillFacts(options_.facts, hello.mutable_hello());
    stream_->Write(hello);
    v1::JoinResponse response;
    while (stream_->Read(&response)) {
      const absl::Status status = Take(response);
      const absl::MutexLock lock(&mutex_);
      heard_at_ = options_.clock->Now();
      if (!status.ok()) {
        end_ = GroupEnd{.exit_code = kExitRankLost, .reason = std::string(status.message())};
      }
      // The first machine waits for the stream's end: it then knows that its word has come.
      if (!status.ok() || response.has_end()) break;
    }
    Close();
  }

  void Close() {
    bool over = false;
    {
      const absl::MutexLock lock(&mutex_);
      over = end_.has_value();
    }
    if (over) context_.TryCancel();
    const absl::Status status = FromGrpcStatus(stream_->Finish());
    const absl::MutexLock lock(&mutex_);
    status_ = status;
    closed_ = true;
  }

  absl::Status Take(const v1::JoinResponse& response) {
    bool stop = false;
    absl::Status status;
    if (response.has_plan()) {
      status = deliverer_.Deliver(response.plan(), &stop);
    } else if (response.has_beat()) {
      status = TakeBeat(response.beat());
    }
    const absl::MutexLock lock(&mutex_);
    stopped_ |= stop;
    drain_asked_ |= stop || (response.has_beat() && response.beat().draining());
    if (response.has_welcome()) welcome_ = response.welcome();
    if (response.has_end()) {
      end_ = EndBecauseOf(0, response.end().exit_code(), response.end().reason());
    }
    return status;
  }

  absl::Status TakeBeat(const v1::Beat& beat) {
    // One of the own ranks would be overwritten with what was true a moment ago.
    const RankRange own = options_.place.own_ranks();
    for (const v1::RankState& state : beat.ranks()) {
      if (own.Contains(static_cast<int32_t>(state.rank()))) {
        return absl::InvalidArgumentError("the first machine speaks of ranks that are not its own");
      }
    }
    RETURN_IF_ERROR(ApplyRanks(beat, {.first = 0, .count = options_.place.rank_count()},
                               options_.control, options_.stats));
    if (!beat.leader_address().empty() && !options_.control->address.written()) {
      options_.control->address.Set(beat.leader_address());
    }
    return absl::OkStatus();
  }

  // Beats, and the end. A thread of its own.
  void Write() {
    Deadline next_beat{};
    for (;;) {
      v1::JoinRequest request;
      bool last = false;
      {
        const absl::MutexLock lock(&mutex_);
        if (closed_) return;
        last = own_end_.has_value();
        if (last) {
          request.mutable_end()->set_exit_code(static_cast<uint32_t>(own_end_->exit_code));
          request.mutable_end()->set_reason(own_end_->reason);
        }
      }
      const Deadline now = options_.clock->Now();
      if (!last && now >= next_beat) {
        next_beat = now + kBeatInterval;
        AddRanks(*options_.control, *options_.stats, options_.place.own_ranks(),
                 request.mutable_beat());
        const absl::MutexLock lock(&mutex_);
        request.mutable_beat()->set_draining(draining_);
      }
      if (request.message_case() != v1::JoinRequest::MESSAGE_NOT_SET && !stream_->Write(request)) {
        return;
      }
      if (last) {
        stream_->WritesDone();
        return;
      }
      const absl::MutexLock lock(&mutex_);
      const auto wanted = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
        return closed_ || own_end_.has_value();
      };
      mutex_.AwaitWithTimeout(absl::Condition(&wanted), absl::FromChrono(kTick));
    }
  }

  const GroupMemberOptions options_;
  SilenceWatch silence_;     // the supervisor's thread alone
  PlanDeliverer deliverer_;  // the reading thread's
  mutable absl::Mutex mutex_;
  std::optional<v1::Welcome> welcome_ ABSL_GUARDED_BY(mutex_);
  std::optional<GroupEnd> end_ ABSL_GUARDED_BY(mutex_);  // the first machine's
  std::optional<GroupEnd> own_end_ ABSL_GUARDED_BY(mutex_);
  absl::Status status_ ABSL_GUARDED_BY(mutex_);  // of the stream, once closed_
  Deadline heard_at_ ABSL_GUARDED_BY(mutex_);
  bool stopped_ ABSL_GUARDED_BY(mutex_) = false;  // the leader's last record has come
  bool drain_asked_ ABSL_GUARDED_BY(mutex_) = false;
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;
  std::unique_ptr<v1::GroupService::Stub> stub_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::JoinRequest, v1::JoinResponse>> stream_;
  std::thread reader_, writer_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<MachineLink>> JoinGroup(GroupMemberOptions options) {
  const Deadline deadline = options.clock->Now() + options.join_timeout;
  const std::shared_ptr<grpc::Channel> channel = MakeChannel(options);
  bool said = false;
  for (;;) {
    if (options.give_up()) return absl::CancelledError("stopped while joining");
    const auto until = std::chrono::system_clock::now() +
                       std::chrono::duration_cast<std::chrono::system_clock::duration>(kAttempt);
    if (channel->WaitForConnected(until)) {
      auto member = std::make_unique<Member>(options, channel);
      const absl::Status status = member->AwaitWelcome(deadline);
      if (status.ok()) {
        member->StartBeats();
        return member;
      }
      if (!absl::IsUnavailable(status)) return status;
    }
    if (options.clock->Now() >= deadline) {
      return absl::UnavailableError(absl::StrCat("the group's first machine at ", options.leader,
                                                 " was not reached in time"));
    }
    if (!std::exchange(said, true)) {
      spdlog::info("waiting for the group's first machine at {}", options.leader);
    }
  }
}

}  // namespace nibble::group
