#include "worker/step/plan_ring.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/check.h"
#include "base/status.h"
#include "worker/step/crc32c.h"
#include "worker/step/group_stats.h"
#include "worker/step/plan_codec.h"

namespace nibble::step {

// At the front of the shared memory; the ring follows on the next page.
struct PlanRingHeader {
  uint64_t magic;
  uint32_t version;
  int32_t readers;
  uint64_t ring_bytes;
  uint64_t record_bytes_max;

  // Written by the writer: the end of the last whole record, as a position in the endless stream.
  alignas(64) std::atomic<uint64_t> written;
  std::atomic<uint32_t> written_futex;  // changes when readers sleep and something was written
  alignas(64) std::atomic<uint32_t> readers_asleep;

  // Written by readers.
  alignas(64) std::atomic<uint32_t> read_futex;  // changes when the writer sleeps and room was made
  std::atomic<uint32_t> writer_asleep;
  struct alignas(64) Cursor {
    std::atomic<uint64_t> read;
  };
  std::array<Cursor, kMaxRanks> cursors;
};

namespace {

static_assert(std::atomic<uint64_t>::is_always_lock_free);
static_assert(std::atomic<uint32_t>::is_always_lock_free);
static_assert(sizeof(std::atomic<uint32_t>) == 4, "a futex is four bytes");

constexpr uint64_t kMagic = 0x31474E4952424E;  // "NBRING1"
constexpr uint32_t kVersion = 1;
constexpr size_t kRingBytesMax = size_t{1} << 30;
// A sleeper looks at the injected clock at least this often.
constexpr long kSleepSliceNs = 100'000'000;

struct RecordHeader {
  uint32_t length;
  uint32_t kind;
  uint64_t step_id;
  uint32_t crc;
  uint32_t zero;
};
static_assert(sizeof(RecordHeader) == 24);
constexpr size_t kCrcCovers = 16;  // of the header: length, kind and step id

size_t RecordBytes(size_t length) { return (sizeof(RecordHeader) + length + 7) & ~size_t{7}; }

uint32_t RecordCrc(const RecordHeader& header, std::span<const std::byte> bytes) {
  const auto front = std::as_bytes(std::span(&header, 1)).first(kCrcCovers);
  return Crc32c(bytes, Crc32c(front));
}

size_t HeaderBytes() {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return (sizeof(PlanRingHeader) + page - 1) / page * page;
}

absl::Status CheckOptions(const PlanRingOptions& options) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  if (options.readers < 1 || options.readers > kMaxRanks) {
    return absl::InvalidArgumentError(
        absl::StrCat("plan ring: ", options.readers, " readers; allowed 1 to ", kMaxRanks));
  }
  if (!std::has_single_bit(options.ring_bytes) || options.ring_bytes < page ||
      options.ring_bytes > kRingBytesMax) {
    return absl::InvalidArgumentError(absl::StrCat("plan ring: ", options.ring_bytes,
                                                   " bytes; allowed powers of two from ", page,
                                                   " to ", kRingBytesMax));
  }
  if (options.record_bytes_max < 64 || options.record_bytes_max > options.ring_bytes / 4) {
    return absl::InvalidArgumentError(
        absl::StrCat("plan ring: records of ", options.record_bytes_max, " bytes; allowed 64 to ",
                     options.ring_bytes / 4));
  }
  return absl::OkStatus();
}

absl::Status Errno(absl::string_view what) {
  return absl::ErrnoToStatus(errno, absl::StrCat("plan ring: ", what));
}

// Sleeps until *word is no longer `expected`, someone wakes it, or a slice of time has passed.
// Shared between processes, hence not FUTEX_PRIVATE.
void FutexSleep(std::atomic<uint32_t>* word, uint32_t expected, long slice_ns) {
  const timespec slice = {.tv_sec = 0, .tv_nsec = slice_ns};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT, expected, &slice, nullptr, 0);
}

void FutexWakeAll(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE,
          std::numeric_limits<int32_t>::max(), nullptr, nullptr, 0);
}

// Wakes who sleeps on `word`. The caller has just published with sequential consistency, and a
// sleeper counts itself before it looks a last time: one of the two sees the other.
void WakeIfAsleep(std::atomic<uint32_t>* asleep, std::atomic<uint32_t>* word) {
  if (asleep->load() == 0) return;
  word->fetch_add(1);
  FutexWakeAll(word);
}

// Waits until ready() or the deadline: true when ready.
template <typename Ready>
bool WaitUntil(const PlanRingWait& wait, Deadline deadline, std::atomic<uint32_t>* asleep,
               std::atomic<uint32_t>* word, Ready ready) {
  if (ready()) return true;
  Deadline now = wait.clock->Now();
  const Deadline spin_end = now + wait.spin;
  while (now < spin_end && now < deadline) {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    now = wait.clock->Now();
  }
  while (now < deadline) {
    const uint32_t seen = word->load();
    asleep->fetch_add(1);
    bool done = ready();
    if (!done) {
      const Duration left = deadline == Deadline::max() ? Duration::max() : deadline - now;
      FutexSleep(word, seen, std::min<Duration::rep>(left.count(), kSleepSliceNs));
      done = ready();
    }
    asleep->fetch_sub(1);
    if (done) return true;
    now = wait.clock->Now();
  }
  return ready();
}

}  // namespace

absl::StatusOr<int> CreatePlanRing(const PlanRingOptions& options) {
  RETURN_IF_ERROR(CheckOptions(options));
  const int fd = memfd_create("nibble-plan-ring", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) return Errno("memfd_create");
  const size_t bytes = HeaderBytes() + options.ring_bytes;
  // Sealing the size means that no holder of the descriptor can take pages away from another.
  // fallocate rather than ftruncate: memory that is not there is an error here, not a fault later.
  if (posix_fallocate(fd, 0, static_cast<off_t>(bytes)) != 0 ||
      fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    close(fd);
    return absl::ResourceExhaustedError(
        absl::StrCat("plan ring: no shared memory for ", bytes, " bytes"));
  }
  void* memory = mmap(nullptr, HeaderBytes(), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) {
    const absl::Status status = Errno("mmap");
    close(fd);
    return status;
  }
  auto* header = static_cast<PlanRingHeader*>(memory);
  header->version = kVersion;
  header->readers = options.readers;
  header->ring_bytes = options.ring_bytes;
  header->record_bytes_max = options.record_bytes_max;
  header->magic = kMagic;
  munmap(memory, HeaderBytes());
  return fd;
}

absl::StatusOr<PlanRingMapping> PlanRingMapping::Attach(int fd) {
  struct stat info = {};
  if (fstat(fd, &info) != 0) return Errno("fstat");
  const auto bytes = static_cast<size_t>(std::max<off_t>(info.st_size, 0));
  if (!S_ISREG(info.st_mode) || bytes <= HeaderBytes()) {
    return absl::InvalidArgumentError("plan ring: the descriptor is no plan ring");
  }
  void* memory = mmap(nullptr, HeaderBytes(), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) return Errno("mmap of the header");
  PlanRingMapping ring;
  ring.header_ = static_cast<PlanRingHeader*>(memory);
  const PlanRingOptions options = {.readers = ring.header_->readers,
                                   .ring_bytes = ring.header_->ring_bytes,
                                   .record_bytes_max = ring.header_->record_bytes_max};
  if (ring.header_->magic != kMagic || ring.header_->version != kVersion ||
      !CheckOptions(options).ok() || bytes != HeaderBytes() + options.ring_bytes) {
    return absl::InvalidArgumentError("plan ring: the descriptor is no plan ring of this version");
  }
  ring.readers_ = options.readers;
  ring.ring_bytes_ = options.ring_bytes;
  ring.record_bytes_max_ = options.record_bytes_max;
  // Room for two copies in a row, then both on top of it.
  void* place = mmap(nullptr, 2 * options.ring_bytes, PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (place == MAP_FAILED) return Errno("mmap of the ring's place");
  ring.data_ = static_cast<std::byte*>(place);
  for (const size_t copy : {size_t{0}, options.ring_bytes}) {
    if (mmap(ring.data_ + copy, options.ring_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
             fd, static_cast<off_t>(HeaderBytes())) == MAP_FAILED) {
      return Errno("mmap of the ring");
    }
  }
  return ring;
}

PlanRingMapping::PlanRingMapping(PlanRingMapping&& other) noexcept
    : header_(std::exchange(other.header_, nullptr)),
      data_(std::exchange(other.data_, nullptr)),
      ring_bytes_(other.ring_bytes_),
      record_bytes_max_(other.record_bytes_max_),
      readers_(other.readers_) {}

PlanRingMapping::~PlanRingMapping() {
  if (header_ != nullptr) munmap(header_, HeaderBytes());
  if (data_ != nullptr) munmap(data_, 2 * ring_bytes_);
}

absl::StatusOr<std::unique_ptr<PlanRingWriter>> PlanRingWriter::Attach(int fd,
                                                                       Duration step_deadline,
                                                                       PlanRingWait wait) {
  CHECK(wait.clock != nullptr);
  ASSIGN_OR_RETURN(PlanRingMapping ring, PlanRingMapping::Attach(fd));
  return std::unique_ptr<PlanRingWriter>(new PlanRingWriter(std::move(ring), step_deadline, wait));
}

absl::Status PlanRingWriter::Publish(const StepPlan& plan) {
  return PublishMessage(PlanMessage::kStep, plan);
}

absl::Status PlanRingWriter::Publish(const MaskBatch& masks) {
  return PublishMessage(PlanMessage::kMasks, masks);
}

absl::Status PlanRingWriter::Stop() {
  if (stopped_) return absl::OkStatus();
  RETURN_IF_ERROR(WaitForRoom(RecordBytes(0)));
  Finish(PlanMessage::kStop, 0, 0);
  stopped_ = true;
  return absl::OkStatus();
}

template <typename Message>
absl::Status PlanRingWriter::PublishMessage(PlanMessage kind, const Message& message) {
  CHECK_MSG(!stopped_, "published after Stop");
  const size_t size = EncodedSize(message);
  if (size > ring_.record_bytes_max()) {
    return absl::ResourceExhaustedError(absl::StrCat("plan ring: step ", message.step_id, " takes ",
                                                     size, " bytes; limit is ",
                                                     ring_.record_bytes_max()));
  }
  RETURN_IF_ERROR(WaitForRoom(RecordBytes(size)));
  std::byte* bytes = ring_.At(written_) + sizeof(RecordHeader);
  ASSIGN_OR_RETURN(const size_t length, Encode(message, std::span(bytes, size)));
  Finish(kind, message.step_id, length);
  return absl::OkStatus();
}

// The bytes stand behind the header's place already.
void PlanRingWriter::Finish(PlanMessage kind, uint64_t step_id, size_t length) {
  RecordHeader header = {.length = static_cast<uint32_t>(length),
                         .kind = static_cast<uint32_t>(kind),
                         .step_id = step_id,
                         .crc = 0,
                         .zero = 0};
  std::byte* record = ring_.At(written_);
  header.crc = RecordCrc(header, std::span(record + sizeof(header), length));
  std::memcpy(record, &header, sizeof(header));
  written_ += RecordBytes(length);
  PlanRingHeader* shared = ring_.header();
  shared->written.store(written_);
  WakeIfAsleep(&shared->readers_asleep, &shared->written_futex);
}

absl::StatusOr<uint64_t> PlanRingWriter::SlowestCursor(int32_t* reader) const {
  uint64_t most_behind = 0;
  *reader = 0;
  for (int32_t i = 0; i < ring_.readers(); ++i) {
    const uint64_t read = ring_.header()->cursors[static_cast<size_t>(i)].read.load();
    // A cursor beyond what was written comes out as an enormous distance.
    const uint64_t behind = written_ - read;
    if (behind > ring_.ring_bytes()) {
      return absl::DataLossError(
          absl::StrCat("plan ring: reader ", i, " has an impossible cursor"));
    }
    if (behind >= most_behind) {
      most_behind = behind;
      *reader = i;
    }
  }
  return written_ - most_behind;
}

absl::Status PlanRingWriter::WaitForRoom(size_t bytes) {
  absl::Status status;
  int32_t slowest = 0;
  const auto has_room = [&] {
    const absl::StatusOr<uint64_t> read = SlowestCursor(&slowest);
    if (!read.ok()) {
      status = read.status();
      return true;
    }
    return written_ - *read + bytes <= ring_.ring_bytes();
  };
  if (has_room()) return status;
  PlanRingHeader* shared = ring_.header();
  const Deadline deadline = wait_.clock->Now() + step_deadline_;
  if (!WaitUntil(wait_, deadline, &shared->writer_asleep, &shared->read_futex, has_room)) {
    const double seconds = std::chrono::duration<double>(step_deadline_).count();
    return absl::DeadlineExceededError(
        absl::StrCat("plan ring: reader ", slowest, " left it full for ", seconds, " s"));
  }
  return status;
}

absl::StatusOr<std::unique_ptr<PlanRingReader>> PlanRingReader::Attach(int fd, int32_t reader,
                                                                       PlanRingWait wait) {
  CHECK(wait.clock != nullptr);
  ASSIGN_OR_RETURN(PlanRingMapping ring, PlanRingMapping::Attach(fd));
  if (reader < 0 || reader >= ring.readers()) {
    return absl::InvalidArgumentError(
        absl::StrCat("plan ring: reader ", reader, "; allowed 0 to ", ring.readers() - 1));
  }
  return std::unique_ptr<PlanRingReader>(new PlanRingReader(std::move(ring), reader, wait));
}

absl::StatusOr<PlanMessage> PlanRingReader::Receive(Deadline deadline, StepPlan* plan,
                                                    MaskBatch* masks) {
  RETURN_IF_ERROR(failed_);
  if (available_ == 0) {
    const absl::Status waited = WaitForRecord(deadline);
    if (!waited.ok()) {
      if (!absl::IsDeadlineExceeded(waited)) failed_ = waited;
      return waited;
    }
  }
  absl::StatusOr<PlanMessage> message = ReadRecord(plan, masks);
  if (!message.ok()) failed_ = message.status();
  return message;
}

absl::Status PlanRingReader::WaitForRecord(Deadline deadline) {
  PlanRingHeader* shared = ring_.header();
  const auto something = [&] {
    available_ = shared->written.load() - read_;
    return available_ != 0;
  };
  if (!WaitUntil(wait_, deadline, &shared->readers_asleep, &shared->written_futex, something)) {
    return absl::DeadlineExceededError("plan ring: no plan by the deadline");
  }
  if (available_ > ring_.ring_bytes() || available_ % 8 != 0) {
    return absl::DataLossError("plan ring: the writer has an impossible cursor");
  }
  return absl::OkStatus();
}

absl::StatusOr<PlanMessage> PlanRingReader::ReadRecord(StepPlan* plan, MaskBatch* masks) {
  const auto bad = [&](absl::string_view what) {
    return absl::DataLossError(absl::StrCat("plan ring: record at ", read_, " ", what));
  };
  if (available_ < sizeof(RecordHeader)) return bad("is cut off");
  const std::byte* record = ring_.At(read_);
  RecordHeader header;
  std::memcpy(&header, record, sizeof(header));
  if (header.length > ring_.record_bytes_max()) return bad("is longer than a record may be");
  const size_t record_bytes = RecordBytes(header.length);
  if (record_bytes > available_) return bad("goes past what was written");
  const std::span bytes(record + sizeof(header), header.length);
  if (RecordCrc(header, bytes) != header.crc) return bad("has a wrong checksum");
  if (header.kind > static_cast<uint32_t>(PlanMessage::kStop)) return bad("is of no known kind");
  const auto kind = static_cast<PlanMessage>(header.kind);
  uint64_t step_id = header.step_id;
  if (kind == PlanMessage::kStep) {
    RETURN_IF_ERROR(Decode(bytes, plan));
    step_id = plan->step_id;
  } else if (kind == PlanMessage::kMasks) {
    RETURN_IF_ERROR(Decode(bytes, masks));
    step_id = masks->step_id;
  }
  if (step_id != header.step_id) return bad("names two steps");
  read_ += record_bytes;
  available_ -= record_bytes;
  PlanRingHeader* shared = ring_.header();
  shared->cursors[static_cast<size_t>(reader_)].read.store(read_);
  WakeIfAsleep(&shared->writer_asleep, &shared->read_futex);
  return kind;
}

}  // namespace nibble::step
