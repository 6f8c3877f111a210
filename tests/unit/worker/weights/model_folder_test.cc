#include "worker/weights/model_folder.h"

#include <filesystem>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tensor_files.h"

namespace nibble::weights {
namespace {

namespace fs = std::filesystem;

// A cache as the hub's clients lay it out.
class HubCacheTest : public FolderTest {
 protected:
  void SetUp() override {
    FolderTest::SetUp();
    fs::create_directories(Path("models--org--name/blobs"));
    fs::create_directories(Path("models--org--name/snapshots/rev"));
    WriteAll(Path("models--org--name/blobs/abc"), "contents");
    WriteAll(Path("secret"), "secret");
  }

  void Link(const std::string& target, const std::string& name) {
    fs::create_symlink(target, Path("models--org--name/snapshots/rev/" + name));
  }
  absl::StatusOr<std::string> Read(const std::string& folder, const std::string& name) {
    auto opened = ModelFolder::Open(Path(folder));
    if (!opened.ok()) return opened.status();
    return opened->ReadFile(name, 1 << 10);
  }
};

constexpr char kSnapshot[] = "models--org--name/snapshots/rev";

TEST_F(HubCacheTest, ASnapshotsLinksIntoItsBlobsAreFollowed) {
  Link("../../blobs/abc", "config.json");
  EXPECT_EQ(Read(kSnapshot, "config.json").value_or("?"), "contents");
  fs::create_directory_symlink(Path(kSnapshot), Path("current"));
  EXPECT_EQ(Read("current", "config.json").value_or("?"), "contents");
}

TEST_F(HubCacheTest, LinksOutOfTheModelsOwnFolderAreNot) {
  Link("../../../secret", "up.json");
  Link(Path("secret"), "absolute.json");
  Link("/etc/passwd", "passwd");
  fs::create_symlink("../../secret", Path("models--org--name/blobs/evil"));
  Link("../../blobs/evil", "twice.json");
  for (const char* name : {"up.json", "absolute.json", "passwd", "twice.json"}) {
    const auto read = Read(kSnapshot, name);
    EXPECT_EQ(read.status().code(), absl::StatusCode::kInvalidArgument) << name;
  }
}

TEST_F(HubCacheTest, FoldersThatAreNoSnapshotAreTheirOwnBound) {
  fs::create_directories(Path("other/snapshots/rev"));
  fs::create_directories(Path("other/blobs"));
  WriteAll(Path("other/blobs/abc"), "contents");
  fs::create_symlink("../../blobs/abc", Path("other/snapshots/rev/config.json"));
  EXPECT_EQ(Read("other/snapshots/rev", "config.json").status().code(),
            absl::StatusCode::kInvalidArgument);
  fs::create_directories(Path("models--org--name/sub/rev"));
  fs::create_symlink("../../blobs/abc", Path("models--org--name/sub/rev/config.json"));
  EXPECT_EQ(Read("models--org--name/sub/rev", "config.json").status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(HubCacheTest, NamesAreStillPlain) {
  for (const char* name : {"../../blobs/abc", "..", ".", "", "a/b"}) {
    EXPECT_EQ(Read(kSnapshot, name).status().code(), absl::StatusCode::kInvalidArgument) << name;
  }
}

}  // namespace
}  // namespace nibble::weights
