// Gloo between processes: in two network namespaces, as two machines would be, and with a peer
// that is killed.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "tests/support/two_namespaces.h"
#include "worker/collectives/gloo_communicator.h"
#include "worker/collectives/store.h"

namespace nibble::collectives {
namespace {

using testing::TwoNamespaces;

constexpr uint64_t kGroupKey = 5;

int ExitStatus(pid_t pid) {
  int status = 0;
  EXPECT_EQ(waitpid(pid, &status, 0), pid);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

int SumManyTimes(Communicator& communicator) {
  const int32_t size = communicator.size();
  for (int turn = 0; turn < 50; ++turn) {
    std::vector<float> data(2048, static_cast<float>(communicator.rank() + 1));
    if (!communicator.AllReduceSum(data).ok()) return 1;
    if (data != std::vector<float>(2048, static_cast<float>(size * (size + 1) / 2))) return 2;
  }
  return 0;
}

pid_t StartProcess(const std::function<int()>& body) {
  const pid_t pid = fork();
  if (pid == 0) _exit(body());
  return pid;
}

TEST(GlooProcessTest, RanksInTwoNetworkNamespacesAgree) {
  const TwoNamespaces machines;
  if (!machines.made()) {
    std::fprintf(stderr, "NOT RUN: Gloo over two network namespaces (not permitted here)\n");
    return;
  }
  constexpr uint16_t kPort = 40123;  // the namespace is ours alone
  const auto rank_on = [&](int side) {
    return StartProcess([&machines, side] {
      if (!machines.Enter(side)) return 90;
      std::unique_ptr<StoreServer> server;
      if (side == 0) {
        auto listening = StoreServer::Listen(
            {.address = machines.address(0), .port = kPort, .group_key = kGroupKey});
        if (!listening.ok()) return 91;
        server = std::move(*listening);
      }
      GlooOptions options{.rank = side,
                          .size = 2,
                          .store_host = machines.address(0),
                          .store_port = kPort,
                          .group_key = kGroupKey};
      // One side names its address, the other its interface.
      (side == 0 ? options.bind_address : options.interface) =
          side == 0 ? machines.address(0) : machines.link(1);
      auto communicator = MakeGlooCommunicator(options);
      if (!communicator.ok()) {
        std::fprintf(stderr, "%s\n", communicator.status().ToString().c_str());
        return 92;
      }
      return SumManyTimes(**communicator);
    });
  };
  const pid_t first = rank_on(0);
  const pid_t second = rank_on(1);
  EXPECT_EQ(ExitStatus(first), 0);
  EXPECT_EQ(ExitStatus(second), 0);
}

TEST(GlooProcessTest, AKilledPeerIsNoticedBeforeTheTimeout) {
  int port_pipe[2];
  ASSERT_EQ(pipe(port_pipe), 0);
  const auto options = [](int32_t rank, uint16_t port) {
    return GlooOptions{.rank = rank,
                       .size = 2,
                       .store_host = "127.0.0.1",
                       .store_port = port,
                       .group_key = kGroupKey,
                       .timeout = std::chrono::seconds(60)};
  };
  const pid_t survivor = StartProcess([&] {
    auto server = StoreServer::Listen({.group_key = kGroupKey});
    if (!server.ok()) return 91;
    const uint16_t port = (*server)->port();
    if (write(port_pipe[1], &port, sizeof(port)) != sizeof(port)) return 92;
    auto communicator = MakeGlooCommunicator(options(0, port));
    if (!communicator.ok()) return 93;
    if (SumManyTimes(**communicator) != 0) return 94;
    std::vector<float> data(8, 1.0f);
    return (*communicator)->AllReduceSum(data).code() == absl::StatusCode::kAborted ? 0 : 95;
  });
  const pid_t killed = StartProcess([&] {
    uint16_t port = 0;
    if (read(port_pipe[0], &port, sizeof(port)) != sizeof(port)) return 92;
    auto communicator = MakeGlooCommunicator(options(1, port));
    if (!communicator.ok() || SumManyTimes(**communicator) != 0) return 93;
    raise(SIGKILL);
    return 94;
  });
  EXPECT_EQ(ExitStatus(killed), -SIGKILL);
  EXPECT_EQ(ExitStatus(survivor), 0);
  close(port_pipe[0]);
  close(port_pipe[1]);
}

}  // namespace
}  // namespace nibble::collectives
