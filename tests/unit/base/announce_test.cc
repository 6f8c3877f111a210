#include "base/announce.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

namespace nibble {
namespace {

TEST(Announcement, ReplacesTheFileAndLeavesNothingElse) {
  const std::filesystem::path folder =
      std::filesystem::path(testing::TempDir()) / ("announce-" + std::to_string(::getpid()));
  std::filesystem::create_directories(folder);
  const std::string path = folder / "where.json";
  ASSERT_TRUE(WriteAnnouncement(path, {{"grpc", "old"}}).ok());
  ASSERT_TRUE(WriteAnnouncement(path, {{"grpc", "127.0.0.1:5"}, {"metrics", "[::1]:6"}}).ok());

  std::ifstream file(path);
  const auto json = nlohmann::json::parse(file);
  EXPECT_EQ(json, (nlohmann::json{{"grpc", "127.0.0.1:5"}, {"metrics", "[::1]:6"}}));
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder),
                          std::filesystem::directory_iterator()),
            1);
  std::filesystem::remove_all(folder);
}

TEST(Announcement, NamesTheFileItCannotWrite) {
  const absl::Status status = WriteAnnouncement("/nonexistent/where.json", {{"grpc", "x"}});
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("/nonexistent/where.json"), std::string::npos);
}

}  // namespace
}  // namespace nibble
