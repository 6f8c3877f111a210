#include "worker/group/orphans.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

namespace nibble::group {
namespace {

// A folder that plays /proc.
class OrphansTest : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_NE(::mkdtemp(folder_.data()), nullptr); }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  void Process(int pid, int parent, std::string line, const char* state = "S") const {
    const std::string of = folder_ + "/" + std::to_string(pid);
    std::filesystem::create_directory(of);
    for (char& letter : line) letter = letter == ' ' ? '\0' : letter;
    std::ofstream(of + "/cmdline") << line;
    std::ofstream(of + "/stat") << pid << " (odd) name) " << state << " " << parent << " 1 1";
    std::ofstream(of + "/statm") << "100 7 3";
  }

  std::string folder_ = std::filesystem::temp_directory_path() / "nibble-orphans-XXXXXX";
};

TEST_F(OrphansTest, OnlyARankWithoutItsSupervisorIsOne) {
  Process(1, 0, "/sbin/init");
  Process(10, 1, "/usr/bin/nibble-worker --model=m");
  Process(11, 10, "/usr/bin/nibble-worker --rank=0 --model=m");
  Process(12, 1, "nibble-worker --rank=1 --model=m");
  Process(13, 1, "/usr/bin/nibble-worker --rank=1", "Z");  // only waits to be reaped
  Process(14, 1, "grep nibble-worker --rank=1");
  Process(15, 1, "/usr/bin/nibble-worker --model=--rank");
  std::filesystem::create_directory(folder_ + "/self");
  const std::vector<Orphan> orphans = FindOrphans(folder_);
  ASSERT_EQ(orphans.size(), 1u);
  EXPECT_EQ(orphans[0].pid, 12);
  EXPECT_EQ(orphans[0].resident_bytes, 7 * ::sysconf(_SC_PAGESIZE));
}

}  // namespace
}  // namespace nibble::group
