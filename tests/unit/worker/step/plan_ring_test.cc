#include "worker/step/plan_ring.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <random>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "sample_plan.h"
#include "worker/step/group_stats.h"

namespace nibble::step {
namespace {

using ::testing::AnyOf;
using ::testing::HasSubstr;

constexpr PlanRingOptions kSmall = {.readers = 1, .ring_bytes = 4096, .record_bytes_max = 1024};

// Time passes only by being looked at, so that a wait ends without any real time.
class LookingClock final : public Clock {
 public:
  Deadline Now() const override {
    return Deadline(std::chrono::milliseconds(looks_.fetch_add(1, std::memory_order_relaxed)));
  }

 private:
  mutable std::atomic<int64_t> looks_{0};
};

class Fd {
 public:
  explicit Fd(const PlanRingOptions& options) {
    const absl::StatusOr<int> made = CreatePlanRing(options);
    EXPECT_TRUE(made.ok()) << made.status();
    fd_ = made.value_or(-1);
  }
  ~Fd() { close(fd_); }
  int get() const { return fd_; }

 private:
  int fd_ = -1;
};

std::unique_ptr<PlanRingWriter> Writer(const Fd& fd, const Clock* clock) {
  auto writer = PlanRingWriter::Attach(fd.get(), std::chrono::seconds(60), {.clock = clock});
  EXPECT_TRUE(writer.ok()) << writer.status();
  return std::move(writer).value();
}

std::unique_ptr<PlanRingReader> Reader(const Fd& fd, int32_t index, const Clock* clock) {
  auto reader = PlanRingReader::Attach(fd.get(), index, {.clock = clock});
  EXPECT_TRUE(reader.ok()) << reader.status();
  return std::move(reader).value();
}

// Plan number i of a run: its size varies, and its contents tell whether it is whole.
StepPlan NumberedPlan(uint64_t i) {
  std::mt19937_64 random(i);
  StepPlan plan = DecodePlan(i, static_cast<int32_t>(random() % 15));
  for (int32_t& id : plan.token_ids) id = static_cast<int32_t>(random() % 1000);
  return plan;
}

// Reads plans 0 … count - 1 and the stop; true when every one is what NumberedPlan says.
bool ReadsAll(PlanRingReader* reader, uint64_t count) {
  StepPlan plan;
  MaskBatch masks;
  for (uint64_t i = 0; i < count; ++i) {
    const auto message = reader->Receive(Deadline::max(), &plan, &masks);
    if (!message.ok() || *message != PlanMessage::kStep) return false;
    const StepPlan expected = NumberedPlan(i);
    if (plan.step_id != i || plan.token_ids != expected.token_ids) return false;
  }
  const auto last = reader->Receive(Deadline::max(), &plan, &masks);
  return last.ok() && *last == PlanMessage::kStop;
}

bool WritesAll(PlanRingWriter* writer, uint64_t count) {
  for (uint64_t i = 0; i < count; ++i) {
    if (!writer->Publish(NumberedPlan(i)).ok()) return false;
  }
  return writer->Stop().ok();
}

TEST(PlanRingTest, DeliversEveryKindOfMessage) {
  const SteadyClock clock;
  const Fd fd(PlanRingOptions{});
  auto writer = Writer(fd, &clock);
  auto reader = Reader(fd, 0, &clock);
  ASSERT_TRUE(writer->Publish(FullPlan(7)).ok());
  ASSERT_TRUE(writer->Publish(MaskBatch{.step_id = 7, .mask_words = {5}, .mask_stride = 1}).ok());
  ASSERT_TRUE(writer->Stop().ok());
  ASSERT_TRUE(writer->Stop().ok());
  StepPlan plan;
  MaskBatch masks;
  EXPECT_EQ(reader->Receive(Deadline::max(), &plan, &masks).value(), PlanMessage::kStep);
  EXPECT_EQ(Encoded(plan), Encoded(FullPlan(7)));
  EXPECT_EQ(reader->Receive(Deadline::max(), &plan, &masks).value(), PlanMessage::kMasks);
  EXPECT_EQ(masks.mask_words, std::vector<uint32_t>{5});
  EXPECT_EQ(reader->Receive(Deadline::max(), &plan, &masks).value(), PlanMessage::kStop);
  const auto nothing = reader->Receive(clock.Now(), &plan, &masks);
  EXPECT_EQ(nothing.status().code(), absl::StatusCode::kDeadlineExceeded);
}

TEST(PlanRingTest, ThreeThreadsReadTheSameThroughManyWraps) {
  const SteadyClock clock;
  PlanRingOptions options = kSmall;
  options.readers = 3;
  const Fd fd(options);
  auto writer = Writer(fd, &clock);
  constexpr uint64_t kPlans = 5000;  // some 2 MB through 4 KB
  std::atomic<int> right = 0;
  std::vector<std::thread> threads;
  for (int32_t i = 0; i < 3; ++i) {
    threads.emplace_back([&, i] {
      auto reader = Reader(fd, i, &clock);
      if (ReadsAll(reader.get(), kPlans)) ++right;
    });
  }
  EXPECT_TRUE(WritesAll(writer.get(), kPlans));
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(right, 3);
}

TEST(PlanRingTest, ProcessesReadTheSame) {
  const SteadyClock clock;
  PlanRingOptions options = kSmall;
  options.readers = 2;
  const Fd fd(options);
  constexpr uint64_t kPlans = 2000;
  std::vector<pid_t> children;
  for (int32_t i = 0; i < 2; ++i) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      auto reader = Reader(fd, i, &clock);
      _exit(ReadsAll(reader.get(), kPlans) ? 0 : 1);
    }
    children.push_back(child);
  }
  auto writer = Writer(fd, &clock);
  EXPECT_TRUE(WritesAll(writer.get(), kPlans));
  for (const pid_t child : children) {
    int status = -1;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status));
    EXPECT_EQ(WEXITSTATUS(status), 0);
  }
}

// A lost wake-up would cost each round a tenth of a second.
TEST(PlanRingTest, SleepersAreWoken) {
  const SteadyClock clock;
  const Fd there(kSmall);
  const Fd back(kSmall);
  constexpr int kRounds = 2000;
  const PlanRingWait no_spin = {.clock = &clock, .spin = Duration(0)};
  std::thread echo([&] {
    auto in = PlanRingReader::Attach(there.get(), 0, no_spin).value();
    auto out = Writer(back, &clock);
    StepPlan plan;
    MaskBatch masks;
    for (int i = 0; i < kRounds; ++i) {
      if (!in->Receive(Deadline::max(), &plan, &masks).ok() || !out->Publish(plan).ok()) return;
    }
  });
  auto out = Writer(there, &clock);
  auto in = PlanRingReader::Attach(back.get(), 0, no_spin).value();
  StepPlan plan;
  MaskBatch masks;
  const Deadline start = clock.Now();
  for (int i = 0; i < kRounds; ++i) {
    ASSERT_TRUE(out->Publish(DecodePlan(static_cast<uint64_t>(i), 1)).ok());
    ASSERT_TRUE(in->Receive(Deadline::max(), &plan, &masks).ok());
    ASSERT_EQ(plan.step_id, static_cast<uint64_t>(i));
  }
  echo.join();
  EXPECT_LT(clock.Now() - start, std::chrono::seconds(60));
}

TEST(PlanRingTest, AReaderThatStaysAwayIsNamed) {
  const LookingClock clock;
  PlanRingOptions options = kSmall;
  options.readers = 2;
  const Fd fd(options);
  auto writer =
      PlanRingWriter::Attach(fd.get(), std::chrono::milliseconds(50), {.clock = &clock}).value();
  auto reader = Reader(fd, 0, &clock);
  StepPlan plan;
  MaskBatch masks;
  absl::Status status;
  uint64_t published = 0;
  while (status.ok() && published < 1000) {
    status = writer->Publish(DecodePlan(published, 4));
    if (!status.ok()) break;
    ++published;
    ASSERT_TRUE(reader->Receive(Deadline::max(), &plan, &masks).ok());
  }
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(status.message(), HasSubstr("reader 1"));
  EXPECT_THAT(status.message(), HasSubstr("0.05 s"));

  // Nothing of what was published is lost, and there is room again once it has been read.
  auto late = Reader(fd, 1, &clock);
  for (uint64_t i = 0; i < published; ++i) {
    ASSERT_TRUE(late->Receive(Deadline::max(), &plan, &masks).ok());
    ASSERT_EQ(plan.step_id, i);
  }
  EXPECT_TRUE(writer->Publish(DecodePlan(published, 4)).ok());
}

TEST(PlanRingTest, ReceiveGivesUpAtItsDeadlineAndGoesOn) {
  const LookingClock clock;
  const Fd fd(kSmall);
  auto writer = Writer(fd, &clock);
  auto reader = Reader(fd, 0, &clock);
  StepPlan plan;
  MaskBatch masks;
  const auto none = reader->Receive(clock.Now() + std::chrono::milliseconds(20), &plan, &masks);
  EXPECT_EQ(none.status().code(), absl::StatusCode::kDeadlineExceeded);
  ASSERT_TRUE(writer->Publish(DecodePlan(3, 2)).ok());
  ASSERT_TRUE(reader->Receive(Deadline::max(), &plan, &masks).ok());
  EXPECT_EQ(plan.step_id, 3u);
}

TEST(PlanRingTest, TakesTheLargestRecordAndRefusesALargerOne) {
  const SteadyClock clock;
  const Fd fd(PlanRingOptions{});
  auto writer = Writer(fd, &clock);
  auto reader = Reader(fd, 0, &clock);
  const size_t fixed = EncodedSize(FullPlan(1, 1)) - 4;
  const auto most = static_cast<int32_t>(((size_t{4} << 20) - fixed) / 4);
  StepPlan plan;
  MaskBatch masks;
  for (uint64_t i = 0; i < 9; ++i) {  // 36 MiB through 16
    ASSERT_TRUE(writer->Publish(FullPlan(i, most)).ok());
    ASSERT_TRUE(reader->Receive(Deadline::max(), &plan, &masks).ok());
    ASSERT_EQ(plan.opened[0].history.size(), static_cast<size_t>(most));
  }
  const absl::Status status = writer->Publish(FullPlan(10, most + 1));
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(status.message(), HasSubstr("limit is 4194304"));
  EXPECT_TRUE(writer->Publish(DecodePlan(11, 1)).ok());
}

// Raw access to the whole shared memory, to damage it.
class Memory {
 public:
  explicit Memory(const Fd& fd) {
    struct stat info = {};
    EXPECT_EQ(fstat(fd.get(), &info), 0);
    size_ = static_cast<size_t>(info.st_size);
    void* memory = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
    EXPECT_NE(memory, MAP_FAILED);
    bytes_ = static_cast<std::byte*>(memory);
  }
  ~Memory() { munmap(bytes_, size_); }
  std::byte& operator[](size_t index) { return bytes_[index]; }
  size_t header_bytes() const { return size_ - kSmall.ring_bytes; }

 private:
  std::byte* bytes_ = nullptr;
  size_t size_ = 0;
};

TEST(PlanRingTest, ADamagedRecordIsDataLossAndStaysSo) {
  const LookingClock clock;
  const StepPlan small = DecodePlan(5, 1);
  const size_t record = 24 + EncodedSize(small);
  for (size_t i = 0; i < record; ++i) {
    if (i >= 20 && i < 24) continue;  // the zero word behind the checksum says nothing
    const Fd fd(kSmall);
    auto writer = Writer(fd, &clock);
    auto reader = Reader(fd, 0, &clock);
    ASSERT_TRUE(writer->Publish(small).ok());
    Memory memory(fd);
    memory[memory.header_bytes() + i] ^= std::byte{0x10};
    StepPlan plan;
    MaskBatch masks;
    const auto message = reader->Receive(Deadline::max(), &plan, &masks);
    EXPECT_EQ(message.status().code(), absl::StatusCode::kDataLoss) << "byte " << i;
    memory[memory.header_bytes() + i] ^= std::byte{0x10};
    EXPECT_EQ(reader->Receive(Deadline::max(), &plan, &masks).status(), message.status());
  }
}

// Whatever happens to the cursors and sizes, nobody reads out of bounds or hangs.
TEST(PlanRingTest, ADamagedHeaderNeverCrashesEitherSide) {
  const LookingClock clock;
  const StepPlan small = DecodePlan(5, 1);
  int data_loss = 0;
  for (size_t i = 0; i < 512; ++i) {
    for (const std::byte flip : {std::byte{0x01}, std::byte{0x80}, std::byte{0xFF}}) {
      const Fd fd(kSmall);
      auto writer = PlanRingWriter::Attach(fd.get(), std::chrono::milliseconds(5),
                                           {.clock = &clock, .spin = std::chrono::seconds(1)})
                        .value();
      auto reader =
          PlanRingReader::Attach(fd.get(), 0, {.clock = &clock, .spin = std::chrono::seconds(1)})
              .value();
      ASSERT_TRUE(writer->Publish(small).ok());
      Memory memory(fd);
      memory[i] ^= flip;
      StepPlan plan;
      MaskBatch masks;
      const auto message =
          reader->Receive(clock.Now() + std::chrono::milliseconds(5), &plan, &masks);
      EXPECT_THAT(message.status().code(), AnyOf(absl::StatusCode::kOk, absl::StatusCode::kDataLoss,
                                                 absl::StatusCode::kDeadlineExceeded));
      EXPECT_TRUE(!message.ok() || plan.step_id == 5u);
      const absl::Status again = writer->Publish(small);
      EXPECT_THAT(again.code(), AnyOf(absl::StatusCode::kOk, absl::StatusCode::kDataLoss,
                                      absl::StatusCode::kDeadlineExceeded));
      if (absl::IsDataLoss(message.status()) || absl::IsDataLoss(again)) ++data_loss;
      // A newcomer attaches or is refused.
      (void)PlanRingReader::Attach(fd.get(), 0, {.clock = &clock});
    }
  }
  EXPECT_GT(data_loss, 0);
}

TEST(PlanRingTest, RefusesWhatIsNoRing) {
  const SteadyClock clock;
  const PlanRingWait wait = {.clock = &clock};
  const auto code = [](const PlanRingOptions& options) {
    return CreatePlanRing(options).status().code();
  };
  const auto invalid = absl::StatusCode::kInvalidArgument;
  EXPECT_EQ(code({.readers = 0}), invalid);
  EXPECT_EQ(code({.readers = kMaxRanks + 1}), invalid);
  EXPECT_EQ(code({.ring_bytes = 5000}), invalid);
  EXPECT_EQ(code({.ring_bytes = 1024}), invalid);
  EXPECT_EQ(code({.record_bytes_max = size_t{5} << 20}), invalid);
  EXPECT_FALSE(PlanRingReader::Attach(-1, 0, wait).ok());
  const int other = memfd_create("other", MFD_CLOEXEC);
  EXPECT_EQ(PlanRingReader::Attach(other, 0, wait).status().code(), invalid);
  ASSERT_EQ(ftruncate(other, 1 << 20), 0);
  EXPECT_EQ(PlanRingReader::Attach(other, 0, wait).status().code(), invalid);
  close(other);
  const Fd fd(kSmall);
  EXPECT_EQ(PlanRingReader::Attach(fd.get(), 1, wait).status().code(), invalid);
  EXPECT_EQ(PlanRingReader::Attach(fd.get(), -1, wait).status().code(), invalid);
  // No holder of the descriptor can shrink the memory under another.
  EXPECT_NE(ftruncate(fd.get(), 0), 0);
}

}  // namespace
}  // namespace nibble::step
