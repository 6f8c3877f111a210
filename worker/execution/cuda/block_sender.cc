#include "worker/execution/cuda/block_sender.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace nibble::execution {
namespace {

constexpr int64_t kPieceBytes = int64_t{8} << 20;
constexpr size_t kSlots = 16;
constexpr size_t kOnTheWay = 4;  // pieces whose transfers nobody waits for

}  // namespace

BlockSender::BlockSender(std::vector<StoredBlock> blocks) : blocks_(std::move(blocks)) {
  for (size_t index = 0; index < blocks_.size(); ++index) {
    const StoredBlock& block = blocks_[index];
    const int64_t lines = std::max<int64_t>(1, kPieceBytes / block.line_bytes);
    for (int64_t first = 0; first < block.lines; first += lines) {
      const int64_t count = std::min(lines, block.lines - first);
      pieces_.push_back({.block = index, .first_line = first, .lines = count});
      piece_bytes_ = std::max(piece_bytes_, count * block.line_bytes);
    }
  }
}

absl::StatusOr<std::unique_ptr<BlockSender>> BlockSender::Create(std::vector<StoredBlock> blocks) {
  std::unique_ptr<BlockSender> sender(new BlockSender(std::move(blocks)));
  if (sender->pieces_.empty()) return sender;
  const size_t slots = std::min(kSlots, sender->pieces_.size());
  ASSIGN_OR_RETURN(sender->pinned_,
                   PinnedMemory::Allocate(static_cast<int64_t>(slots) * sender->piece_bytes_));
  sender->slots_.resize(slots);
  for (size_t i = 0; i < slots; ++i) {
    Slot& slot = sender->slots_[i];
    slot.data = sender->pinned_.as<std::byte>() + static_cast<int64_t>(i) * sender->piece_bytes_;
    RETURN_IF_ERROR(CudaStatus(cudaEventCreateWithFlags(&slot.sent, cudaEventDisableTiming),
                               "creating an event"));
  }
  RETURN_IF_ERROR(sender->StartMore());
  return sender;
}

BlockSender::~BlockSender() {
  for (Slot& slot : slots_) {
    if (slot.filled.valid()) slot.filled.wait();
    if (slot.sent != nullptr) {
      static_cast<void>(cudaEventSynchronize(slot.sent));
      static_cast<void>(cudaEventDestroy(slot.sent));
    }
  }
}

absl::Status BlockSender::StartMore() {
  const size_t ahead = slots_.size() > kOnTheWay ? slots_.size() - kOnTheWay : 1;
  while (started_ < pieces_.size() && started_ < sent_ + ahead) {
    Slot& slot = slots_[started_ % slots_.size()];
    RETURN_IF_ERROR(CudaStatus(cudaEventSynchronize(slot.sent), "sending weights"));
    const Piece& piece = pieces_[started_++];
    // Where no thread is to be had, SendNext does the work.
    slot.filled = std::async(std::launch::async | std::launch::deferred, [this, &piece, &slot] {
      CopyLines(blocks_[piece.block], piece.first_line, piece.lines, slot.data);
    });
  }
  return absl::OkStatus();
}

absl::Status BlockSender::SendNext(void* to, cudaStream_t stream) {
  CHECK(sent_ < pieces_.size());
  const size_t block = pieces_[sent_].block;
  auto* target = static_cast<std::byte*>(to);
  for (; sent_ < pieces_.size() && pieces_[sent_].block == block; ++sent_) {
    RETURN_IF_ERROR(StartMore());
    Slot& slot = slots_[sent_ % slots_.size()];
    slot.filled.get();
    const int64_t bytes = pieces_[sent_].lines * blocks_[block].line_bytes;
    RETURN_IF_ERROR(CudaStatus(cudaMemcpyAsync(target, slot.data, static_cast<size_t>(bytes),
                                               cudaMemcpyHostToDevice, stream),
                               "sending weights"));
    RETURN_IF_ERROR(CudaStatus(cudaEventRecord(slot.sent, stream), "recording an event"));
    target += bytes;
  }
  return StartMore();
}

}  // namespace nibble::execution
