#include "worker/machines.h"

#include <netdb.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/host_port.h"
#include "base/logging.h"
#include "base/status.h"
#include "base/tls_options.h"
#include "worker/group/group_host.h"
#include "worker/group/group_member.h"
#include "worker/step/plan_ring.h"

namespace nibble::worker {
namespace {

constexpr Duration kSilenceMax = std::chrono::seconds(3);
constexpr Duration kSilenceMin = std::chrono::milliseconds(1500);
constexpr Duration kOwnNameMax = std::chrono::seconds(30);
constexpr auto kOwnNamePoll = std::chrono::milliseconds(250);

// A machine is lost within the step deadline, but never for a moment's delay.
Duration SilenceLimit(const WorkerOptions& options) {
  return std::clamp(options.step_deadline, kSilenceMin, kSilenceMax);
}

// Of the first machine's name: the numeric address that names it (`towards` false), or the own one
// that is used to reach it. Sends nothing.
absl::StatusOr<std::string> NumericAddress(const std::string& host, uint16_t port, bool towards) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_DGRAM;
  addrinfo* found = nullptr;
  const int resolved = ::getaddrinfo(host.c_str(), absl::StrCat(port).c_str(), &hints, &found);
  if (resolved != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("group_leader ", host, " cannot be resolved: ", ::gai_strerror(resolved)));
  }
  sockaddr_storage name{};
  socklen_t length = found->ai_addrlen;
  std::copy_n(reinterpret_cast<const char*>(found->ai_addr), length,
              reinterpret_cast<char*>(&name));
  bool reached = true;
  if (towards) {
    const int fd = ::socket(found->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    length = sizeof(name);
    reached = fd >= 0 && ::connect(fd, found->ai_addr, found->ai_addrlen) == 0 &&
              ::getsockname(fd, reinterpret_cast<sockaddr*>(&name), &length) == 0;
    if (fd >= 0) ::close(fd);
  }
  ::freeaddrinfo(found);
  char text[NI_MAXHOST] = {};
  if (!reached || ::getnameinfo(reinterpret_cast<sockaddr*>(&name), length, text, sizeof(text),
                                nullptr, 0, NI_NUMERICHOST) != 0) {
    return absl::InvalidArgumentError(absl::StrCat("there is no way to group_leader ", host));
  }
  return std::string(text);
}

bool SignalPending() {
  sigset_t pending;
  sigemptyset(&pending);
  return ::sigpending(&pending) == 0 &&
         (sigismember(&pending, SIGTERM) == 1 || sigismember(&pending, SIGINT) == 1);
}

// A new pod's own name may take a moment to appear.
absl::StatusOr<std::string> AwaitOwnName(const HostPort& leader, const Clock* clock) {
  const Deadline until = clock->Now() + kOwnNameMax;
  for (;;) {
    absl::StatusOr<std::string> address = NumericAddress(leader.host, leader.port, false);
    if (address.ok() || clock->Now() >= until || SignalPending()) return address;
    std::this_thread::sleep_for(kOwnNamePoll);
  }
}

// Machines show each other the certificate of the leader's port, and ask for one that its CA
// signed.
absl::Status OpenTls(const WorkerOptions& options, step::GroupStats* stats, Machines* machines) {
  if (!options.tls.any()) return absl::OkStatus();
  if (options.tls.ca.empty()) {
    return absl::InvalidArgumentError(
        "tls.client_ca is empty; the machines of a group know each other by it where there is TLS");
  }
  ASSIGN_OR_RETURN(machines->tls, TlsSource::Open({.files = options.tls,
                                                   .names = ServerTlsNames(),
                                                   .stats = &stats->machines_tls}));
  return absl::OkStatus();
}

absl::Status Host(const WorkerOptions& options, const HostPort& leader,
                  const group::RankFacts& facts, const MachinesContext& context,
                  Machines* machines) {
  const group::MachinePlace place = PlaceOf(options);
  ASSIGN_OR_RETURN(const std::string address, AwaitOwnName(leader, context.clock));
  uint64_t key = 0;
  if (::getrandom(&key, sizeof(key), 0) != sizeof(key)) {
    return absl::InternalError("there are no random numbers to be had");
  }
  auto store = collectives::StoreServer::Listen({.address = address, .port = 0, .group_key = key});
  if (!store.ok()) return absl::InvalidArgumentError(store.status().message());
  machines->store = *std::move(store);
  group::Rendezvous& rendezvous = context.control->rendezvous;
  rendezvous.host.Set(address);
  rendezvous.own_address.Set(address);
  rendezvous.port = machines->store->port();
  rendezvous.key = key;

  group::GroupHostOptions host;
  host.listen = FormatHostPort(address, leader.port);
  if (machines->tls != nullptr) host.credentials = machines->tls->ServerCredentials();
  host.place = place;
  host.facts = facts;
  host.control = context.control;
  host.stats = context.stats;
  host.clock = context.clock;
  host.join_timeout = options.join_timeout;
  host.silence_max = SilenceLimit(options);
  for (int32_t machine = 1; machine < place.machines; ++machine) {
    // Behind the readers of the local followers.
    ASSIGN_OR_RETURN(auto reader, step::PlanRingReader::Attach(
                                      context.ring_fd, place.ranks_each - 1 + machine - 1,
                                      {.clock = context.clock, .spin = Duration::zero()}));
    host.plans.push_back(std::move(reader));
  }
  ASSIGN_OR_RETURN(auto link, group::GroupHost::Start(std::move(host)));
  spdlog::info("machine 0 of {} waits for the others at {}", place.machines, link->address());
  machines->link = std::move(link);
  return absl::OkStatus();
}

absl::Status JoinFirst(const WorkerOptions& options, const HostPort& leader,
                       const group::RankFacts& facts, const MachinesContext& context,
                       Machines* machines) {
  ASSIGN_OR_RETURN(machines->plans, step::PlanRingWriter::Attach(
                                        context.ring_fd, options.step_deadline,
                                        {.clock = context.clock, .spin = Duration::zero()}));
  group::GroupMemberOptions member;
  member.leader = options.group_leader;
  if (machines->tls != nullptr) member.credentials = machines->tls->ChannelCredentials();
  member.place = PlaceOf(options);
  member.facts = facts;
  member.control = context.control;
  member.stats = context.stats;
  member.clock = context.clock;
  member.plans = machines->plans.get();
  member.join_timeout = options.join_timeout;
  member.silence_max = SilenceLimit(options);
  member.give_up = SignalPending;
  ASSIGN_OR_RETURN(machines->link, group::JoinGroup(std::move(member)));
  // Only now: before, its name may not have been known.
  ASSIGN_OR_RETURN(const std::string own, NumericAddress(leader.host, leader.port, true));
  context.control->rendezvous.own_address.Set(own);
  spdlog::info("machine {} of {} has joined {}", options.group_index, options.group_size,
               options.group_leader);
  return absl::OkStatus();
}

}  // namespace

Failure ConnectMachines(const WorkerOptions& options, const group::RankFacts& facts,
                        const MachinesContext& context, Machines* machines) {
  if (options.group_size == 1) return {};
  const absl::StatusOr<HostPort> leader = ParseHostPort(options.group_leader);
  absl::Status status = leader.status();
  if (status.ok()) status = OpenTls(options, context.stats, machines);
  if (status.ok()) {
    status = options.group_index == 0 ? Host(options, *leader, facts, context, machines)
                                      : JoinFirst(options, *leader, facts, context, machines);
  }
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return {};
    case absl::StatusCode::kCancelled:
      return {.exit_code = kExitDrained, .status = std::move(status)};
    case absl::StatusCode::kFailedPrecondition:
      return {.exit_code = kExitModel, .status = std::move(status)};
    case absl::StatusCode::kInvalidArgument:
      return {.exit_code = kExitConfiguration, .status = std::move(status)};
    default:
      return {.exit_code = kExitRankLost, .status = std::move(status)};
  }
}

}  // namespace nibble::worker
