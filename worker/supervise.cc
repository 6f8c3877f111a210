#include "worker/supervise.h"

#include <unistd.h>

#include <cstdio>
#include <ctime>
#include <filesystem>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/announce.h"
#include "base/exit_codes.h"
#include "base/last_words.h"
#include "base/logging.h"
#include "base/metrics_server.h"
#include "base/progress.h"
#include "base/status.h"
#include "base/tls_metrics.h"
#include "base/tls_options.h"
#include "base/units.h"
#include "worker/collectives/shm_communicator.h"
#include "worker/group/group_metrics.h"
#include "worker/group/orphans.h"
#include "worker/group/shared_memory.h"
#include "worker/group/supervisor.h"
#include "worker/machines.h"
#include "worker/planned_model.h"
#include "worker/rank_arguments.h"
#include "worker/rpc/listen_address.h"
#include "worker/step/plan_ring.h"

namespace nibble::worker {
namespace {

constexpr Duration kOrphansGoneMax = std::chrono::seconds(5);
constexpr auto kOrphansPoll = std::chrono::milliseconds(50);

// Says on standard error, and where the place wants it, why this process ends.
int Say(const WorkerOptions& options, int exit_code, const std::string& why) {
  std::fprintf(stderr, "nibble-worker: %s\n", why.c_str());
  if (exit_code != kExitDrained) WriteLastWords(options.termination_log, exit_code, why);
  return exit_code;
}

int Refuse(const WorkerOptions& options, const Failure& failure) {
  return Say(options, failure.exit_code, std::string(failure.status.message()));
}

// Ranks leave within seconds of their supervisor; one that does not would share its memory with the
// new ones.
absl::Status AwaitNoOrphans() {
  const SteadyClock clock;
  const Deadline until = clock.Now() + kOrphansGoneMax;
  for (;;) {
    const std::vector<group::Orphan> orphans = group::FindOrphans();
    if (orphans.empty()) return absl::OkStatus();
    if (clock.Now() >= until) {
      return absl::ResourceExhaustedError(
          absl::StrCat("process ", orphans.front().pid, ", a rank of an earlier group, holds ",
                       FormatBytes(orphans.front().resident_bytes),
                       " and does not leave; ranks without a supervisor: ", orphans.size()));
    }
    std::this_thread::sleep_for(kOrphansPoll);
  }
}

// What all ranks share, made before they start and unmade with the last descriptor.
struct Shared {
  group::SharedObject<group::GroupControl> control;
  group::SharedObject<step::GroupStats> stats;
  OwnedFd ring;                                         // several ranks only
  std::unique_ptr<collectives::ShmRegion> collectives;  // several ranks only

  [[nodiscard]] static absl::StatusOr<Shared> Create(const group::MachinePlace& place) {
    ASSIGN_OR_RETURN(auto control,
                     group::SharedObject<group::GroupControl>::Create("nibble-control"));
    ASSIGN_OR_RETURN(auto stats, group::SharedObject<step::GroupStats>::Create("nibble-stats"));
    Shared shared{.control = std::move(control),
                  .stats = std::move(stats),
                  .ring = {},
                  .collectives = nullptr};
    if (place.rank_count() == 1) return shared;
    // The leader's machine: its other ranks and the other machines. Elsewhere: every rank.
    const int32_t readers =
        place.index == 0 ? place.ranks_each - 1 + place.machines - 1 : place.ranks_each;
    ASSIGN_OR_RETURN(const int ring, step::CreatePlanRing({.readers = readers}));
    shared.ring = OwnedFd(ring);
    if (place.machines > 1) return shared;  // ranks meet over the network
    ASSIGN_OR_RETURN(auto region, collectives::ShmRegion::Create(place.ranks_each));
    shared.collectives = std::make_unique<collectives::ShmRegion>(std::move(region));
    return shared;
  }

  [[nodiscard]] std::vector<int> fds() const {
    std::vector<int> list = {control.fd(), stats.fd()};
    if (ring.valid()) list.push_back(ring.get());
    if (collectives != nullptr) list.push_back(collectives->fd());
    return list;
  }
};

group::SupervisorOptions GroupOptions(const WorkerOptions& options, const Shared& shared,
                                      const Clock* clock) {
  group::SupervisorOptions group_options;
  const group::MachinePlace place = PlaceOf(options);
  group_options.ranks = place.ranks_each;
  group_options.first_rank = place.own_ranks().first;
  group_options.group_ranks = options.tp;
  std::error_code error;
  group_options.executable = std::filesystem::read_symlink("/proc/self/exe", error).string();
  group_options.arguments = [&options, &shared](const group::RankDescriptors& own) {
    std::vector<std::string> words =
        Format({.rank = own.rank,
                .stats_fd = shared.stats.fd(),
                .control_fd = shared.control.fd(),
                .ring_fd = shared.ring.get(),
                .collectives_fd = shared.collectives == nullptr ? -1 : shared.collectives->fd(),
                .death_fd = own.death_fd,
                .command_fd = own.command_fd});
    for (std::string& word : ToArguments(options)) words.push_back(std::move(word));
    return words;
  };
  group_options.shared_fds = shared.fds();
  group_options.control = shared.control.get();
  group_options.stats = shared.stats.get();
  group_options.clock = clock;
  group_options.hang = {.soft = options.step_deadline / 2, .hard = options.step_deadline};
  group_options.drain_timeout = options.drain_timeout;
  return group_options;
}

// The metrics port, or nothing where it is off.
absl::StatusOr<std::unique_ptr<MetricsServer>> StartMetrics(const WorkerOptions& options,
                                                            const PlannedModel& model,
                                                            const step::GroupStats* stats,
                                                            const Clock* clock,
                                                            const group::Supervisor* supervisor) {
  if (options.metrics_listen.empty()) return nullptr;
  MetricsServer::Options server;
  server.address = options.metrics_listen;
  server.vllm_names = options.metrics_vllm_names;
  server.collectables.push_back(
      std::make_shared<group::GroupMetrics>(stats, clock, MetricFactsOf(options, model)));
  server.collectables.push_back(std::make_shared<TlsMetrics>(
      std::vector<TlsMetrics::Use>{{.label = "listen", .stats = &stats->listen_tls},
                                   {.label = "machines", .stats = &stats->machines_tls}}));
  server.live = [supervisor] { return supervisor->Live(); };
  server.ready = [supervisor] { return supervisor->Ready(); };
  return MetricsServer::Start(std::move(server));
}

void LogPlan(const WorkerOptions& options, const PlannedModel& model) {
  if (OnGpu(options)) return;  // each rank's, once it has asked its GPU
  const group::RankRange own = PlaceOf(options).own_ranks();
  for (const weights::RankMemoryPlan& rank : model.plan.ranks) {
    if (!own.Contains(rank.share.rank)) continue;
    spdlog::info(
        "rank {} plans {}: weights {}, KV cache {} in {} blocks, activations {}, "
        "workspace {}",
        rank.share.rank, FormatBytes(rank.total_bytes()), FormatBytes(rank.weight_bytes),
        FormatBytes(rank.kv_block_bytes * model.plan.kv_blocks), model.plan.kv_blocks,
        FormatBytes(rank.activation_bytes), FormatBytes(rank.workspace_bytes));
  }
  spdlog::info("{} with {} ranks of {} threads", options.model_name, options.tp, options.threads);
}

int Run(const WorkerOptions& options, const PlannedModel& model, const Shared& shared) {
  const SteadyClock clock;
  Machines machines;
  const Failure connected = ConnectMachines(options, FactsOf(options, model),
                                            {.control = shared.control.get(),
                                             .stats = shared.stats.get(),
                                             .clock = &clock,
                                             .ring_fd = shared.ring.get()},
                                            &machines);
  if (!connected.ok()) return Refuse(options, connected);
  group::SupervisorOptions group_options = GroupOptions(options, shared, &clock);
  group_options.others = machines.link.get();
  // The bar ends with its owner, before the line that says where the group serves.
  auto progress = std::make_unique<Progress>(Progress::ForStderr("loading weights", true), &clock);
  group_options.on_load_progress = [&progress](int64_t done, int64_t total) {
    progress->Update(done, total);
  };
  std::unique_ptr<MetricsServer> metrics;
  group_options.on_serving = [&](const std::string& address) -> absl::Status {
    progress.reset();
    const std::string metrics_address = metrics == nullptr ? "" : metrics->address();
    spdlog::info("serving {} at {}, metrics at {}", options.model_name, address,
                 metrics_address.empty() ? "none" : metrics_address);
    if (options.announce.empty()) return absl::OkStatus();
    return WriteAnnouncement(options.announce, {{"grpc", address}, {"metrics", metrics_address}});
  };

  group::Supervisor supervisor(std::move(group_options));
  auto started = StartMetrics(options, model, shared.stats.get(), &clock, &supervisor);
  if (!started.ok())
    return Refuse(options, {.exit_code = kExitConfiguration, .status = started.status()});
  metrics = *std::move(started);
  const group::GroupEnd end = supervisor.Run();
  progress.reset();
  if (end.exit_code == kExitDrained) {
    spdlog::info("the group has ended: {}", end.reason);
  } else {
    return Say(options, end.exit_code, end.reason);
  }
  return end.exit_code;
}

}  // namespace

int Supervise(const WorkerOptions& options) {
  const auto listen = rpc::ParseListenAddress(options.listen);
  absl::Status status = listen.status();
  const bool has_leader = options.group_index == 0;
  if (status.ok() && has_leader) status = rpc::CheckAvailable(*listen);
  if (status.ok()) status = CheckServerTls(options.tls);
  // Before minutes of loading, and in one line.
  if (status.ok()) {
    status = ReadTlsFiles(options.tls, ServerTlsNames(), std::time(nullptr)).status();
  }
  if (!status.ok())
    return Refuse(options, {.exit_code = kExitConfiguration, .status = std::move(status)});
  if (status = AwaitNoOrphans(); !status.ok()) {
    return Refuse(options, {.exit_code = kExitNoMemory, .status = std::move(status)});
  }
  PlannedModel model;
  if (const Failure failure = OpenAndPlan(options, nullptr, &model); !failure.ok())
    return Refuse(options, failure);
  const auto shared = Shared::Create(PlaceOf(options));
  if (!shared.ok()) return Refuse(options, {.exit_code = kExitNoMemory, .status = shared.status()});
  LogPlan(options, model);
  return Run(options, model, *shared);
}

}  // namespace nibble::worker
