// Real checkpoints, damaged: each is refused by name and at once, or nothing that counts changed.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/support/test_data.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/memory_plan.h"

namespace nibble::weights {
namespace {

namespace fs = std::filesystem;
using std::chrono::milliseconds;
using ::testing::HasSubstr;
using Clock = std::chrono::steady_clock;

// What users are promised; asserted at three times that, for machines that are slow or do other
// work.
constexpr milliseconds kRefusal{100};
constexpr milliseconds kRefusalAsserted = 3 * kRefusal;
constexpr char kWeights[] = "model.safetensors";
constexpr char kConfig[] = "config.json";

// A model folder that may be damaged. Of the weights only the header is copied: the data is a hole
// of the same length, so that gigabytes cost nothing.
class DamagedCopy {
 public:
  explicit DamagedCopy(const std::string& original, bool with_data) {
    std::string name = fs::temp_directory_path() / "nibble-damage-XXXXXX";
    EXPECT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
    for (const char* file : {"config.json", "generation_config.json"}) {
      if (fs::exists(original + "/" + file)) fs::copy_file(original + "/" + file, Path(file));
    }
    size_ = static_cast<int64_t>(fs::file_size(original + "/" + kWeights));
    std::ifstream weights(original + "/" + kWeights, std::ios::binary);
    uint64_t length = 0;
    weights.read(reinterpret_cast<char*>(&length), sizeof(length));
    weights.seekg(0);
    front_.resize(with_data ? static_cast<size_t>(size_) : sizeof(length) + length);
    header_bytes_ = sizeof(length) + length;
    weights.read(front_.data(), static_cast<std::streamsize>(front_.size()));
    file_ = open(Path(kWeights).c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    Write(0, front_);
    Truncate(size_);
  }
  ~DamagedCopy() {
    close(file_);
    fs::remove_all(folder_);
  }
  DamagedCopy(const DamagedCopy&) = delete;
  DamagedCopy& operator=(const DamagedCopy&) = delete;

  [[nodiscard]] const std::string& folder() const { return folder_; }
  [[nodiscard]] std::string Path(const std::string& file) const { return folder_ + "/" + file; }
  // The length's eight bytes and the JSON behind them.
  [[nodiscard]] const std::string& front() const { return front_; }
  [[nodiscard]] size_t header_bytes() const { return header_bytes_; }
  [[nodiscard]] int64_t size() const { return size_; }

  void FlipBit(size_t bit) {
    const auto byte = static_cast<char>(front_[bit / 8] ^ (1 << bit % 8));
    Write(bit / 8, std::string(1, byte));
  }
  void Restore(size_t byte) { Write(byte, front_.substr(byte, 1)); }
  void Truncate(int64_t bytes) { EXPECT_EQ(ftruncate(file_, bytes), 0); }
  void RestoreLength() {
    Truncate(size_);
    Write(0, front_);
  }

 private:
  void Write(size_t at, const std::string& bytes) const {
    EXPECT_EQ(pwrite(file_, bytes.data(), bytes.size(), static_cast<off_t>(at)),
              static_cast<ssize_t>(bytes.size()));
  }

  std::string folder_;
  std::string front_;
  size_t header_bytes_ = 0;
  int64_t size_ = 0;
  int file_ = -1;
};

// What a start does before it loads: every header and config is read and every layer described.
absl::StatusOr<uint64_t> Start(const std::string& folder) {
  auto checkpoint = Checkpoint::Open(folder);
  if (!checkpoint.ok()) return checkpoint.status();
  const auto plan = PlanMemory(**checkpoint, 1, {});
  if (!plan.ok()) return plan.status();
  return (*checkpoint)->IdentityHash();
}

struct Attempt {
  absl::StatusOr<uint64_t> identity;
  Clock::duration took;
  int tries = 0;
};

// The quickest of a few where the first takes too long: a busy machine that gives the core to
// others must not look like a slow refusal.
Attempt StartWithin(const std::string& folder, Clock::duration bound) {
  constexpr int kTries = 5;
  Attempt best = {.identity = absl::UnknownError("not tried"), .took = Clock::duration::max()};
  for (int i = 0; i < kTries && best.took >= bound; ++i) {
    const auto begin = Clock::now();
    auto identity = Start(folder);
    const auto took = Clock::now() - begin;
    if (took < best.took) best = {.identity = std::move(identity), .took = took};
    best.tries = i + 1;
  }
  return best;
}

// Tries one damage after the other and keeps what the report needs.
class Trial {
 public:
  // `folder` as it is, which must start.
  explicit Trial(const std::string& folder) : folder_(folder) {
    const auto identity = Start(folder);
    EXPECT_TRUE(identity.ok()) << identity.status();
    identity_ = identity.value_or(0);
  }
  ~Trial() {
    std::printf(
        "%d damages: %d refused, the slowest after %.1f ms (%d tried again); %d changed "
        "nothing\n",
        refused_ + harmless_, refused_, std::chrono::duration<double, std::milli>(slowest_).count(),
        again_, harmless_);
  }
  Trial(const Trial&) = delete;
  Trial& operator=(const Trial&) = delete;

  // Refused in time with the file and the tensor named, or the same model.
  void Run(bool must_be_refused) {
    const auto [identity, took, tries] = StartWithin(folder_, kRefusal);
    again_ += tries > 1;
    if (identity.ok()) {
      ++harmless_;
      EXPECT_FALSE(must_be_refused);
      EXPECT_EQ(*identity, identity_);
      return;
    }
    CheckRefusal(identity.status(), took);
  }
  // As Run(), for a file whose every value may be meant: what is accepted may be another model.
  void RunAny() {
    const auto [identity, took, tries] = StartWithin(folder_, kRefusal);
    again_ += tries > 1;
    if (identity.ok()) {
      ++harmless_;
    } else {
      CheckRefusal(identity.status(), took);
    }
  }
  [[nodiscard]] int refused() const { return refused_; }
  [[nodiscard]] int harmless() const { return harmless_; }

 private:
  void CheckRefusal(const absl::Status& status, Clock::duration took) {
    ++refused_;
    slowest_ = std::max<Clock::duration>(slowest_, took);
    EXPECT_LT(took, kRefusalAsserted);
    const std::string said(status.message());
    const auto names = [&said](std::string_view what) { return said.find(what) != said.npos; };
    EXPECT_TRUE(names(kWeights) || names(kConfig)) << said;
    // The tensor, where it is one's fault and not the header's as a whole.
    EXPECT_TRUE(names("tensor \"") || names("layer \"") || names(kConfig) || names("header") ||
                names(": the last tensor ends at "))
        << said;
  }

  const std::string folder_;
  uint64_t identity_ = 0;
  int refused_ = 0;
  int harmless_ = 0;
  int again_ = 0;  // whose first try took too long
  Clock::duration slowest_{};
};

std::string TinyModel(const char* name) {
  return nibble::testing::SourceDir() + "/tests/data/model-specs/" + name;
}

void FlipBits(DamagedCopy* copy, const std::vector<size_t>& bits, Trial* trial) {
  for (const size_t bit : bits) {
    copy->FlipBit(bit);
    SCOPED_TRACE("bit " + std::to_string(bit));
    trial->Run(/*must_be_refused=*/false);
    copy->Restore(bit / 8);
    if (::testing::Test::HasFailure()) return;
  }
}

std::vector<size_t> AllBits(size_t bytes) {
  std::vector<size_t> bits(bytes * 8);
  for (size_t i = 0; i < bits.size(); ++i) bits[i] = i;
  return bits;
}

TEST(CheckpointDamage, EveryHeaderBitOfATinyCheckpoint) {
  DamagedCopy copy(TinyModel("llama-awq-gemm"), /*with_data=*/true);
  Trial trial(copy.folder());
  FlipBits(&copy, AllBits(copy.header_bytes()), &trial);
  // Only what nobody reads may change: the letters of __metadata__.
  EXPECT_LT(trial.harmless(), 100);
}

TEST(CheckpointDamage, EveryTruncationOfATinyFile) {
  DamagedCopy copy(TinyModel("qwen2-awq-quantized-head"), /*with_data=*/true);
  Trial trial(copy.folder());
  std::vector<int64_t> lengths;
  const auto header = static_cast<int64_t>(copy.header_bytes());
  for (int64_t length = 0; length <= header; ++length) lengths.push_back(length);
  for (int64_t length = header; length < copy.size(); ++length) lengths.push_back(length);
  lengths.push_back(copy.size() + 1);
  for (const int64_t length : lengths) {
    copy.Truncate(length);
    SCOPED_TRACE(length);
    trial.Run(/*must_be_refused=*/true);
    copy.RestoreLength();
    if (::testing::Test::HasFailure()) return;
  }
}

TEST(CheckpointDamage, EveryBitAndEveryTruncationOfAConfig) {
  DamagedCopy copy(TinyModel("llama-awq-gemm"), /*with_data=*/true);
  const std::string path = copy.Path(kConfig);
  std::ifstream original(path, std::ios::binary);
  const std::string config((std::istreambuf_iterator<char>(original)), {});
  Trial trial(copy.folder());
  const auto run = [&](const std::string& text) {
    std::ofstream(path, std::ios::binary | std::ios::trunc) << text;
    trial.RunAny();
  };
  for (const size_t bit : AllBits(config.size())) {
    SCOPED_TRACE("bit " + std::to_string(bit));
    std::string damaged = config;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
    run(damaged);
    if (::testing::Test::HasFailure()) return;
  }
  const int accepted = trial.harmless();
  for (size_t length = 0; length + 2 < config.size(); ++length) {
    SCOPED_TRACE(length);
    run(config.substr(0, length));
    if (::testing::Test::HasFailure()) return;
  }
  EXPECT_EQ(trial.harmless(), accepted);  // no beginning of it is a config
}

TEST(CheckpointDamage, SamplesOfARealCheckpointsHeaderAndLength) {
  const auto original =
      nibble::testing::TestData("models/smollm2-135m-awq-gemm-g64",
                                "CheckpointDamage.SamplesOfARealCheckpointsHeaderAndLength");
  if (!original.has_value()) return;
  DamagedCopy copy(*original, /*with_data=*/false);
  std::mt19937 random(20);
  Trial trial(copy.folder());
  std::vector<size_t> bits = AllBits(sizeof(uint64_t));
  for (int i = 0; i < 1000; ++i) bits.push_back(random() % (copy.header_bytes() * 8));
  FlipBits(&copy, bits, &trial);
  for (int i = 0; i < 200; ++i) {
    const auto length = static_cast<int64_t>(random() % static_cast<uint64_t>(copy.size()));
    copy.Truncate(length);
    SCOPED_TRACE(length);
    trial.Run(/*must_be_refused=*/true);
    copy.RestoreLength();
  }
}

// Headers up to the largest that is read at all (16 MiB; those of real models have less than one).
TEST(CheckpointDamage, HostileHeadersAreRefusedAtOnce) {
  DamagedCopy copy(TinyModel("llama-awq-gemm"), /*with_data=*/true);
  const auto tensors = [](size_t bytes) {
    std::string text = "{";
    while (text.size() < bytes) {
      absl::StrAppend(&text, "\"t", text.size(),
                      R"(":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)");
    }
    text.back() = '}';
    return text;
  };
  const auto escapes = [](const std::string& one) {
    std::string text = "{\"__metadata__\":{\"a\":\"";
    while (text.size() + one.size() <= 16 << 20) text += one;
    return text;
  };
  const std::vector<std::pair<std::string, const char*>> headers = {
      {tensors(4 << 20), "tensor \"t"},
      {tensors(15 << 20), "more than 131072 tensors"},
      {std::string(16 << 20, '['), "begin with"},
      {absl::StrCat("{\"a\":", std::string((16 << 20) - 5, '[')), "tensor \"a\""},
      {absl::StrCat("{\"", std::string((16 << 20) - 2, 'x')), "JSON"},
      {absl::StrCat("{", std::string((16 << 20) - 1, ' ')), "JSON"},
      {absl::StrCat("{\"a\":{\"shape\":[", std::string((16 << 20) - 15, '1')), "JSON"},
      {escapes("\\u00e9"), "JSON"},
      {escapes("\xc3\xa9"), "JSON"},
  };
  for (const auto& [header, said] : headers) {
    const uint64_t length = header.size();
    std::ofstream file(copy.Path(kWeights), std::ios::binary | std::ios::trunc);
    file.write(reinterpret_cast<const char*>(&length), sizeof(length));
    file << header << 'x';
    file.close();
    const auto [identity, took, tries] = StartWithin(copy.folder(), kRefusal);
    ASSERT_FALSE(identity.ok());
    EXPECT_THAT(std::string(identity.status().message()), HasSubstr(kWeights));
    EXPECT_THAT(std::string(identity.status().message()), HasSubstr(said));
    EXPECT_LT(took, kRefusalAsserted);
    std::printf("a header of %zu bytes is refused after %.1f ms\n", header.size(),
                std::chrono::duration<double, std::milli>(took).count());
  }
}

}  // namespace
}  // namespace nibble::weights
