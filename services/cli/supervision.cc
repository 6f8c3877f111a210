#include "services/cli/supervision.h"

#include <poll.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "base/announce.h"
#include "base/check.h"
#include "base/exit_codes.h"
#include "base/logging.h"
#include "base/units.h"
#include "services/cli/health.h"

namespace nibble::cli {
namespace {

// How often an announcement is looked for while a program starts.
constexpr Duration kStartPoll = std::chrono::milliseconds(20);
constexpr Duration kHealthPatience = std::chrono::milliseconds(200);
// Beyond the drain itself.
constexpr Duration kDrainGrace = std::chrono::seconds(5);
constexpr Duration kWorkerPatience = std::chrono::seconds(15);

// A program's own code where it says why; a death by signal is a rank lost or a failure.
int CodeOf(const ChildExit& exit) {
  if (exit.signal != 0) return kExitFailure;
  return exit.code == 0 ? kExitFailure : exit.code;
}

const std::string& AddressOf(const std::vector<std::pair<std::string, std::string>>& addresses,
                             const std::string& key) {
  static const std::string kNone = "?";
  const auto found = std::find_if(addresses.begin(), addresses.end(),
                                  [&](const auto& entry) { return entry.first == key; });
  return found == addresses.end() ? kNone : found->second;
}

void ReplaceFlag(std::vector<std::string>* command, const std::string& flag,
                 const std::string& value) {
  for (std::string& word : *command) {
    if (word.starts_with(flag + "=")) word = absl::StrCat(flag, "=", value);
  }
}

}  // namespace

Supervision::Supervision(ServeOptions options, ServePaths paths)
    : options_(std::move(options)),
      paths_(std::move(paths)),
      worker_{.name = "worker group",
              .command = WorkerCommandLine(options_, paths_),
              .announce = paths_.worker_announce()},
      gateway_{.name = "gateway",
               .command = GatewayCommandLine(options_, paths_),
               .announce = paths_.gateway_announce()} {
  sigset_t wanted;
  sigemptyset(&wanted);
  sigaddset(&wanted, SIGTERM);
  sigaddset(&wanted, SIGINT);
  sigprocmask(SIG_BLOCK, &wanted, &signals_before_);
  signal_descriptor_ = signalfd(-1, &wanted, SFD_CLOEXEC | SFD_NONBLOCK);
  CHECK(signal_descriptor_ >= 0);
}

Supervision::~Supervision() {
  close(signal_descriptor_);
  sigprocmask(SIG_SETMASK, &signals_before_, nullptr);
}

int Supervision::Run() {
  if (const auto code = StartFirst(&worker_)) return *code;
  if (const auto code = StartFirst(&gateway_)) return *code;
  SayReady();
  if (!options_.announce.empty()) {
    std::vector<std::pair<std::string, std::string>> addresses = gateway_.addresses;
    addresses.emplace_back("worker_metrics", AddressOf(worker_.addresses, "metrics"));
    const absl::Status written = WriteAnnouncement(options_.announce, addresses);
    if (!written.ok()) {
      spdlog::error("{}", std::string(written.message()));
      return kExitConfiguration;
    }
  }
  while (true) {
    const bool starting =
        (worker_.process && !worker_.ready) || (gateway_.process && !gateway_.ready);
    Deadline until = std::min(worker_.start_at, gateway_.start_at);
    if (starting) until = std::min(until, clock_.Now() + kStartPoll);
    if (Await(until) != 0) return ShutDown();
    for (Service* service : {&worker_, &gateway_}) {
      LookForAnnouncement(service);
      Watch(service);
      StartWhereDue(service);
    }
  }
}

std::optional<int> Supervision::StartFirst(Service* service) {
  if (!Start(service)) return kExitFailure;
  const Deadline deadline = clock_.Now() + options_.start_timeout;
  while (!service->ready) {
    if (Await(clock_.Now() + kStartPoll) != 0) {
      spdlog::info("told to end before the {} was ready", service->name);
      return ShutDown();
    }
    LookForAnnouncement(service);
    for (Service* other : {&worker_, &gateway_}) {
      if (!other->process || !other->process->Poll()) continue;
      const ChildExit exit = *other->process->Poll();
      spdlog::error("the {} ended with {} before all was ready", other->name, exit.Describe());
      return CodeOf(exit);
    }
    if (clock_.Now() > deadline) {
      spdlog::error("the {} was not ready within start_timeout {}", service->name,
                    FormatDuration(options_.start_timeout));
      return kExitFailure;
    }
  }
  return std::nullopt;
}

bool Supervision::Start(Service* service) {
  std::error_code ignored;
  std::filesystem::remove(service->announce, ignored);
  auto process = ChildProcess::Start(service->command);
  service->start_at = Deadline::max();
  if (!process.ok()) {
    spdlog::error("cannot start the {}: {}", service->name,
                  std::string(process.status().message()));
    return false;
  }
  service->process = *std::move(process);
  service->started = clock_.Now();
  service->ready = false;
  return true;
}

void Supervision::LookForAnnouncement(Service* service) {
  if (!service->process || service->ready) return;
  std::ifstream file(service->announce);
  if (!file) return;
  const auto json = nlohmann::json::parse(file, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return;
  service->addresses.clear();
  for (const auto& [key, value] : json.items()) {
    if (value.is_string()) service->addresses.emplace_back(key, value.get<std::string>());
  }
  // The gateway listens before it has found the group.
  if (service == &gateway_ &&
      !IsServing(AddressOf(service->addresses, "metrics"), kHealthPatience)) {
    return;
  }
  service->ready = true;
  // The next start takes the same ports, also where any free one was asked for.
  const std::string& metrics = AddressOf(service->addresses, "metrics");
  if (metrics != "?") ReplaceFlag(&service->command, "--metrics-listen", metrics);
  if (service == &gateway_) {
    ReplaceFlag(&service->command, "--listen", AddressOf(service->addresses, "grpc"));
  }
  spdlog::info("the {} is ready after {:.1f} s", service->name,
               std::chrono::duration<double>(clock_.Now() - service->started).count());
}

void Supervision::Watch(Service* service) {
  if (!service->process || !service->process->Poll()) return;
  const ChildExit exit = *service->process->Poll();
  const Deadline now = clock_.Now();
  const Duration wait = service->backoff.Next(now - service->started);
  spdlog::error("the {} ended with {}; starting it again in {}", service->name, exit.Describe(),
                FormatDuration(wait));
  service->process.reset();
  service->start_at = now + wait;
}

void Supervision::StartWhereDue(Service* service) {
  if (service->process || clock_.Now() < service->start_at) return;
  if (!Start(service)) service->start_at = clock_.Now() + service->backoff.Next(Duration::zero());
}

int Supervision::Await(Deadline until) {
  std::array<pollfd, 3> descriptors{};
  nfds_t count = 0;
  descriptors[count++] = {.fd = signal_descriptor_, .events = POLLIN, .revents = 0};
  for (const Service* service : {&worker_, &gateway_}) {
    // One that is known to have ended would make every poll() return at once.
    if (service->process && !service->process->Poll()) {
      descriptors[count++] = {.fd = service->process->pidfd(), .events = POLLIN, .revents = 0};
    }
  }
  int timeout_ms = -1;
  if (until != Deadline::max()) {
    const Duration left = std::max(until - clock_.Now(), Duration::zero());
    timeout_ms = static_cast<int>(std::chrono::ceil<std::chrono::milliseconds>(left).count());
  }
  poll(descriptors.data(), count, timeout_ms);
  signalfd_siginfo info{};
  if (read(signal_descriptor_, &info, sizeof(info)) != sizeof(info)) return 0;
  return static_cast<int>(info.ssi_signo);
}

bool Supervision::End(Service* service, Duration patience) {
  if (!service->process) return true;
  service->process->Signal(SIGTERM);
  const Deadline deadline = clock_.Now() + patience;
  bool impatient = false;
  while (!service->process->Poll() && !impatient && clock_.Now() < deadline) {
    impatient = Await(std::min(deadline, clock_.Now() + kStartPoll)) != 0;
  }
  if (!service->process->Poll()) {
    spdlog::warn("the {} is killed: {}", service->name,
                 impatient ? "told to end twice" : "it did not end in time");
    service->process.reset();
    return false;
  }
  const ChildExit exit = *service->process->Poll();
  if (!exit.ok()) spdlog::warn("the {} ended with {}", service->name, exit.Describe());
  service->process.reset();
  return exit.ok();
}

int Supervision::ShutDown() {
  spdlog::info("draining: running requests have {}", FormatDuration(options_.drain_timeout));
  const bool gateway_ok = End(&gateway_, options_.drain_timeout + kDrainGrace);
  const bool worker_ok = End(&worker_, kWorkerPatience);
  spdlog::info("ended");
  return gateway_ok && worker_ok ? kExitDrained : kExitFailure;
}

void Supervision::SayReady() const {
  const std::string& address = AddressOf(gateway_.addresses, "grpc");
  std::printf(
      "nibble is ready: gRPC %s, %d rank%s on %s\n"
      "metrics: http://%s/metrics (gateway), http://%s/metrics (workers)\n"
      "try: nibble chat --server %s \"Why is the sky blue?\"\n",
      address.c_str(), options_.tp, options_.tp == 1 ? "" : "s", options_.device.c_str(),
      AddressOf(gateway_.addresses, "metrics").c_str(),
      AddressOf(worker_.addresses, "metrics").c_str(), address.c_str());
  std::fflush(stdout);
}

}  // namespace nibble::cli
