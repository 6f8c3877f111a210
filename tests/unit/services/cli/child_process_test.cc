#include "services/cli/child_process.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

namespace nibble::cli {
namespace {

constexpr int kPatienceMs = 20000;

ChildExit AwaitEnd(ChildProcess* child) {
  pollfd descriptor = {.fd = child->pidfd(), .events = POLLIN, .revents = 0};
  EXPECT_EQ(poll(&descriptor, 1, kPatienceMs), 1);
  EXPECT_TRUE(child->Poll().has_value());
  return child->Poll().value_or(ChildExit{.code = -1});
}

std::unique_ptr<ChildProcess> Shell(const std::string& script) {
  auto child = ChildProcess::Start({"/bin/sh", "-c", script});
  EXPECT_TRUE(child.ok());
  return *std::move(child);
}

TEST(ChildProcess, SaysHowItEnded) {
  auto child = Shell("exit 5");
  const ChildExit exit = AwaitEnd(child.get());
  EXPECT_EQ(exit.code, 5);
  EXPECT_FALSE(exit.ok());
  EXPECT_EQ(exit.Describe(), "exit code 5");
  EXPECT_EQ(AwaitEnd(child.get()).code, 5);  // and again
}

TEST(ChildProcess, SaysWhichSignalEndedIt) {
  auto child = Shell("kill -TERM $$");
  EXPECT_EQ(AwaitEnd(child.get()).Describe(), "signal 15 (Terminated)");
}

TEST(ChildProcess, CanBeSignalled) {
  auto child = Shell("exec sleep 1000");
  EXPECT_FALSE(child->Poll().has_value());
  child->Signal(SIGTERM);
  EXPECT_EQ(AwaitEnd(child.get()).signal, SIGTERM);
  child->Signal(SIGTERM);  // no effect, no crash
}

TEST(ChildProcess, IsKilledWithItsOwnerAndAllThatItStarted) {
  int ends[2];  // every process of the family holds the writing end
  ASSERT_EQ(pipe(ends), 0);
  pid_t pid = 0;
  {
    auto child =
        Shell("trap '' TERM; sleep 1000 & echo started >&" + std::to_string(ends[1]) + "; wait");
    pid = child->pid();
    char started[8];
    EXPECT_EQ(read(ends[0], started, sizeof(started)), 8);
  }
  EXPECT_NE(kill(pid, 0), 0);
  close(ends[1]);
  pollfd closed = {.fd = ends[0], .events = POLLIN, .revents = 0};
  EXPECT_EQ(poll(&closed, 1, kPatienceMs), 1);
  EXPECT_EQ(closed.revents & (POLLIN | POLLHUP), POLLHUP) << "a grandchild lives on";
  close(ends[0]);
}

TEST(ChildProcess, SeesNoSettingsOfOurs) {
  setenv("NIBBLE_TP", "7", 1);
  auto child = Shell("test -z \"$NIBBLE_TP\" && test -n \"$PATH\"");
  EXPECT_TRUE(AwaitEnd(child.get()).ok());
  unsetenv("NIBBLE_TP");
}

TEST(ChildProcess, OfAProgramThatIsNotThereIsAnError) {
  EXPECT_FALSE(ChildProcess::Start({"/nowhere/program"}).ok());
}

}  // namespace
}  // namespace nibble::cli
