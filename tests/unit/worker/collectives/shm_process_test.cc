// Shared-memory collectives between real processes, with and without a peer that is killed.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <memory>
#include <vector>

#include "worker/collectives/shm_communicator.h"

namespace nibble::collectives {
namespace {

// Runs `body` in a child process as a rank that got the region's descriptor; its result is the
// exit status.
pid_t StartRank(int fd, int32_t rank, Duration timeout,
                const std::function<int(Communicator& communicator)>& body) {
  const pid_t pid = fork();
  if (pid != 0) return pid;
  int result = 99;
  auto region = ShmRegion::Attach(fd);
  if (region.ok()) {
    auto communicator = MakeShmCommunicator(&*region, rank, {.timeout = timeout});
    if (communicator.ok()) result = body(**communicator);
  }
  _exit(result);
}

int ExitStatus(pid_t pid) {
  int status = 0;
  EXPECT_EQ(waitpid(pid, &status, 0), pid);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

constexpr Duration kLong = std::chrono::seconds(30);

TEST(ShmProcessTest, RanksInProcessesAgree) {
  for (const int32_t ranks : {1, 2, 3, 5}) {
    auto region = ShmRegion::Create(ranks);
    ASSERT_TRUE(region.ok()) << region.status();
    std::vector<pid_t> pids;
    for (int32_t rank = 0; rank < ranks; ++rank) {
      pids.push_back(StartRank(region->fd(), rank, kLong, [&](Communicator& communicator) {
        for (int turn = 0; turn < 100; ++turn) {
          std::vector<float> data(1000, static_cast<float>(communicator.rank() + 1));
          if (!communicator.AllReduceSum(data).ok()) return 1;
          const auto expected = static_cast<float>(ranks * (ranks + 1) / 2);
          if (data != std::vector<float>(1000, expected)) return 2;
        }
        return 0;
      }));
    }
    for (const pid_t pid : pids) EXPECT_EQ(ExitStatus(pid), 0) << ranks << " ranks";
  }
}

TEST(ShmProcessTest, AKilledPeerEndsTheWaitOfTheOthers) {
  auto region = ShmRegion::Create(3);
  ASSERT_TRUE(region.ok());
  std::vector<pid_t> pids;
  for (int32_t rank = 0; rank < 3; ++rank) {
    pids.push_back(StartRank(
        region->fd(), rank, std::chrono::milliseconds(300), [&](Communicator& communicator) {
          std::vector<float> data(10, 1.0f);
          if (!communicator.AllReduceSum(data).ok()) return 1;
          if (communicator.rank() == 1) raise(SIGKILL);
          const absl::StatusCode code = communicator.AllReduceSum(data).code();
          // Whoever notices first tells the other.
          return code == absl::StatusCode::kDeadlineExceeded || code == absl::StatusCode::kAborted
                     ? 0
                     : 2;
        }));
  }
  EXPECT_EQ(ExitStatus(pids[0]), 0);
  EXPECT_EQ(ExitStatus(pids[1]), -SIGKILL);
  EXPECT_EQ(ExitStatus(pids[2]), 0);
  EXPECT_TRUE(region->aborted());
}

TEST(ShmProcessTest, TheSupervisorEndsAWaitAtOnce) {
  auto region = ShmRegion::Create(2);
  ASSERT_TRUE(region.ok());
  const pid_t waiting = StartRank(region->fd(), 0, kLong, [](Communicator& communicator) {
    std::vector<float> data(10, 1.0f);
    return communicator.AllReduceSum(data).code() == absl::StatusCode::kAborted ? 0 : 1;
  });
  const pid_t dying = StartRank(region->fd(), 1, kLong, [](Communicator&) { return 7; });
  EXPECT_EQ(ExitStatus(dying), 7);
  region->Abort();  // what the supervisor does when a rank ends
  EXPECT_EQ(ExitStatus(waiting), 0);
}

TEST(ShmProcessTest, OtherDescriptorsAreRefused) {
  const int fd = memfd_create("stranger", MFD_CLOEXEC);
  ASSERT_GE(fd, 0);
  EXPECT_EQ(ShmRegion::Attach(fd).status().code(), absl::StatusCode::kInvalidArgument);
  ASSERT_EQ(ftruncate(fd, 1 << 20), 0);
  EXPECT_EQ(ShmRegion::Attach(fd).status().code(), absl::StatusCode::kInvalidArgument);
  close(fd);
  EXPECT_FALSE(ShmRegion::Attach(fd).ok());
}

TEST(ShmProcessTest, TheRegionCannotBeCutShort) {
  auto region = ShmRegion::Create(2);
  ASSERT_TRUE(region.ok());
  EXPECT_NE(ftruncate(region->fd(), 0), 0);
  EXPECT_NE(fcntl(region->fd(), F_GETFD) & FD_CLOEXEC, 0);
}

}  // namespace
}  // namespace nibble::collectives
