#include "worker/group/group_host.h"

#include <grpcpp/resource_quota.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include <map>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "base/exit_codes.h"
#include "base/grpc_header_bound.h"
#include "base/grpc_status.h"
#include "base/host_port.h"
#include "base/logging.h"
#include "base/status.h"
#include "nibble/worker/v1/group.grpc.pb.h"
#include "worker/group/plan_relay.h"
#include "worker/group/rank_mirror.h"

namespace nibble::group {
namespace {

namespace v1 = worker::v1;

constexpr int kMessageBytesMax = 8 << 20;  // a plan is at most 4 MiB
constexpr int kMetadataBytesMax = 8 << 10;
constexpr int kSpareThreads = 16;  // for callers that have not said who they are
constexpr Duration kHelloTime = std::chrono::seconds(5);
constexpr Duration kRelayTick = std::chrono::milliseconds(50);

using Stream = grpc::ServerReaderWriter<v1::JoinResponse, v1::JoinRequest>;

// Another machine. Guarded by the host's mutex, but for `plans`, which is its sending thread's.
struct Machine {
  bool joined = false;
  bool closed = false;      // its stream has ended
  bool stop_sent = false;   // the leader's last record
  bool ended_well = false;  // `end` says that it was drained
  Deadline heard_at{};
  std::optional<GroupEnd> end;
  std::unique_ptr<step::PlanReceiver> plans;
};

class Host final : public GroupHost, private v1::GroupService::Service {
 public:
  explicit Host(GroupHostOptions options)
      : options_(std::move(options)),
        silence_(options_.silence_max),
        machines_(static_cast<size_t>(options_.place.machines) - 1),
        join_until_(options_.clock->Now() + options_.join_timeout) {
    for (size_t i = 0; i < machines_.size(); ++i) machines_[i].plans = std::move(options_.plans[i]);
  }

  ~Host() override {
    {
      const absl::MutexLock lock(&mutex_);
      closing_ = true;
    }
    if (server_ != nullptr) server_->Shutdown(std::chrono::system_clock::now());
  }

  absl::Status Listen() {
    BoundGrpcHeaderBlocks(kMetadataBytesMax);
    grpc::ServerBuilder builder;
    builder.SetMaxReceiveMessageSize(kMessageBytesMax);
    builder.SetMaxSendMessageSize(kMessageBytesMax);
    builder.AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, kMetadataBytesMax);
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    grpc::ResourceQuota quota("group");
    quota.SetMaxThreads(static_cast<int>(machines_.size()) + kSpareThreads);
    builder.SetResourceQuota(quota);
    int port = 0;
    builder.AddListeningPort(options_.listen, options_.credentials, &port);
    builder.RegisterService(static_cast<v1::GroupService::Service*>(this));
    server_ = builder.BuildAndStart();
    if (server_ == nullptr || port == 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("group leader address ", options_.listen, " cannot be bound"));
    }
    ASSIGN_OR_RETURN(const HostPort listen, ParseHostPort(options_.listen));
    address_ = FormatHostPort(listen.host, static_cast<uint16_t>(port));
    return absl::OkStatus();
  }

  std::string address() const override { return address_; }

  bool Joined() const override {
    const absl::MutexLock lock(&mutex_);
    for (const Machine& machine : machines_) {
      if (!machine.joined) return false;
    }
    return true;
  }

  std::optional<GroupEnd> Lost(Deadline now) override {
    const absl::MutexLock lock(&mutex_);
    silence_.Observe(now);
    for (const auto& [context, since] : strangers_) {
      if (now - since > kHelloTime) context->TryCancel();
    }
    for (size_t i = 0; i < machines_.size(); ++i) {
      if (auto lost = LostMachine(machines_[i], static_cast<int32_t>(i) + 1, now)) return lost;
    }
    return std::nullopt;
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
    end_ = end;
    const auto told = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      for (const Machine& machine : machines_) {
        if (machine.joined && !machine.closed) return false;
      }
      return true;
    };
    mutex_.AwaitWithTimeout(absl::Condition(&told), absl::FromChrono(patience));
  }

 private:
  grpc::Status Join(grpc::ServerContext* context, Stream* stream) override {
    v1::JoinRequest request;
    if (!ReadHello(context, stream, &request)) {
      return {grpc::StatusCode::INVALID_ARGUMENT, "a machine says Hello first, and soon"};
    }
    const absl::Status admitted = Admit(request.hello());
    if (!admitted.ok()) {
      spdlog::warn("refused a machine at {}: {}", context->peer(), std::string(admitted.message()));
      return ToGrpcStatus(admitted);
    }
    const auto index = static_cast<int32_t>(request.hello().index());
    Machine* machine = &machines_[static_cast<size_t>(index) - 1];
    spdlog::info("machine {} of {} has joined", index, options_.place.machines);
    std::thread sender([&] { Send(index, machine, stream); });
    while (stream->Read(&request)) {
      if (!Take(request, index, machine)) break;
    }
    {
      const absl::MutexLock lock(&mutex_);
      machine->closed = true;
    }
    sender.join();
    return grpc::Status::OK;
  }

  bool ReadHello(grpc::ServerContext* context, Stream* stream, v1::JoinRequest* request) {
    {
      const absl::MutexLock lock(&mutex_);
      if (closing_) return false;
      strangers_[context] = options_.clock->Now();
    }
    const bool read = stream->Read(request);
    const absl::MutexLock lock(&mutex_);
    strangers_.erase(context);
    return read && request->has_hello();
  }

  absl::Status Admit(const v1::Hello& hello) {
    const MachinePlace& place = options_.place;
    if (hello.group_size() != static_cast<uint32_t>(place.machines) || hello.index() == 0 ||
        hello.index() >= hello.group_size()) {
      return absl::InvalidArgumentError(absl::StrCat("machine ", hello.index(), " of ",
                                                     hello.group_size(), " joins a group of ",
                                                     place.machines));
    }
    RETURN_IF_ERROR(CompareFacts(FactsOf(hello), absl::StrCat("machine ", hello.index()),
                                 options_.facts, "the leader's machine"));
    const absl::MutexLock lock(&mutex_);
    Machine& machine = machines_[hello.index() - 1];
    if (machine.joined) {
      return absl::AlreadyExistsError(
          absl::StrCat("machine ", hello.index(), " has joined before"));
    }
    machine.joined = true;
    machine.heard_at = options_.clock->Now();
    return absl::OkStatus();
  }

  // False where the machine may say no more.
  bool Take(const v1::JoinRequest& request, int32_t index, Machine* machine) {
    absl::Status status;
    if (request.has_beat()) {
      status = ApplyRanks(request.beat(), options_.place.RanksOf(index), options_.control,
                          options_.stats);
    } else if (!request.has_end()) {
      status = absl::InvalidArgumentError("a machine sent what it may not");
    }
    const absl::MutexLock lock(&mutex_);
    machine->heard_at = options_.clock->Now();
    if (request.has_beat()) drain_asked_ |= request.beat().draining();
    if (request.has_end()) {
      machine->end = EndBecauseOf(index, request.end().exit_code(), request.end().reason());
      machine->ended_well = request.end().exit_code() == kExitDrained;
    }
    if (!status.ok()) machine->end = EndBecauseOf(index, kExitRankLost, Text(status));
    return status.ok();
  }

  // The sending thread of one machine: plans as they come, beats, and the end.
  void Send(int32_t index, Machine* machine, Stream* stream) {
    v1::JoinResponse welcome;
    FillWelcome(welcome.mutable_welcome());
    PlanSender plans(machine->plans.get());
    bool more_plans = true;
    Deadline next_beat{};
    if (!stream->Write(welcome)) return;
    for (;;) {
      v1::JoinResponse response;
      if (!more_plans) std::this_thread::sleep_for(kRelayTick);
      if (more_plans) {
        const absl::Status status =
            plans.Next(options_.clock->Now() + kRelayTick, response.mutable_plan());
        if (status.ok()) {
          if (!stream->Write(response)) return;
          more_plans = response.plan().kind() != v1::PlanRecord::KIND_STOP;
          if (!more_plans) {
            const absl::MutexLock lock(&mutex_);
            machine->stop_sent = true;
          }
        } else if (!absl::IsDeadlineExceeded(status)) {
          const absl::MutexLock lock(&mutex_);
          machine->end = GroupEnd{.exit_code = kExitRankLost, .reason = Text(status)};
          more_plans = false;
        }
      }
      if (SendEnd(machine, stream)) return;
      const Deadline now = options_.clock->Now();
      if (now < next_beat) continue;
      next_beat = now + kBeatInterval;
      if (!SendBeat(index, stream)) return;
    }
  }

  bool SendBeat(int32_t index, Stream* stream) {
    v1::JoinResponse response;
    v1::Beat* beat = response.mutable_beat();
    for (int32_t other = 0; other < options_.place.machines; ++other) {
      if (other == index) continue;
      AddRanks(*options_.control, *options_.stats, options_.place.RanksOf(other), beat);
    }
    beat->set_leader_address(options_.control->address.Get().value_or(""));
    {
      const absl::MutexLock lock(&mutex_);
      beat->set_draining(draining_ || options_.stats->engine.draining.Get() != 0);
    }
    return stream->Write(response);
  }

  // True where this machine gets nothing more.
  bool SendEnd(Machine* machine, Stream* stream) {
    v1::JoinResponse response;
    {
      const absl::MutexLock lock(&mutex_);
      if (machine->closed || closing_) return true;
      if (!end_.has_value()) return false;
      // A drained group's last record goes first.
      if (end_->exit_code == kExitDrained && draining_ && !machine->stop_sent) return false;
      response.mutable_end()->set_exit_code(static_cast<uint32_t>(end_->exit_code));
      response.mutable_end()->set_reason(end_->reason);
    }
    stream->Write(response);
    return true;
  }

  void FillWelcome(v1::Welcome* welcome) const {
    const Rendezvous& rendezvous = options_.control->rendezvous;
    welcome->set_store_host(rendezvous.host.Get().value_or(""));
    welcome->set_store_port(rendezvous.port);
    welcome->set_store_key(rendezvous.key);
  }

  std::optional<GroupEnd> LostMachine(const Machine& machine, int32_t index, Deadline now) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (!machine.joined) {
      if (now < join_until_) return std::nullopt;
      return EndBecauseOf(index, kExitRankLost, "has not joined in time");
    }
    // Once the leader has said stop, machines leave as they please.
    if (machine.stop_sent && (machine.closed || machine.ended_well)) return std::nullopt;
    if (machine.end.has_value()) return machine.end;
    if (machine.closed) return EndBecauseOf(index, kExitRankLost, "its connection is lost");
    if (!silence_.TooLong(now, machine.heard_at)) return std::nullopt;
    return EndBecauseOf(
        index, kExitRankLost,
        absl::StrCat("nothing heard of it for ",
                     absl::ToInt64Milliseconds(absl::FromChrono(silence_.limit())), " ms"));
  }

  static std::string Text(const absl::Status& status) { return std::string(status.message()); }

  GroupHostOptions options_;
  std::string address_;
  SilenceWatch silence_;  // the supervisor's thread alone
  mutable absl::Mutex mutex_;
  std::map<grpc::ServerContext*, Deadline> strangers_ ABSL_GUARDED_BY(mutex_);
  std::vector<Machine> machines_;
  const Deadline join_until_;
  std::optional<GroupEnd> end_ ABSL_GUARDED_BY(mutex_);
  bool drain_asked_ ABSL_GUARDED_BY(mutex_) = false;
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  bool closing_ ABSL_GUARDED_BY(mutex_) = false;
  std::unique_ptr<grpc::Server> server_;  // last: its threads use the rest
};

}  // namespace

absl::StatusOr<std::unique_ptr<GroupHost>> GroupHost::Start(GroupHostOptions options) {
  auto host = std::make_unique<Host>(std::move(options));
  RETURN_IF_ERROR(host->Listen());
  return host;
}

}  // namespace nibble::group
