#include "worker/collectives/gloo_communicator.h"

#include <gloo/rendezvous/context.h>
#include <gloo/rendezvous/store.h>
#include <gloo/transport/tcp/device.h>
#include <gloo/transport/unbound_buffer.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status.h"
#include "worker/collectives/self_communicator.h"
#include "worker/collectives/store.h"
#include "worker/collectives/sum.h"

namespace nibble::collectives {
namespace {

constexpr size_t kChunkBytes = size_t{256} << 10;  // staging per rank

std::chrono::milliseconds Milliseconds(Duration duration) {
  return std::chrono::duration_cast<std::chrono::milliseconds>(duration);
}

// Gloo's rendezvous interface over our store. Gloo expects exceptions; they end in
// MakeGlooCommunicator.
class RendezvousStore final : public gloo::rendezvous::Store {
 public:
  RendezvousStore(StoreClient* client, Deadline deadline) : client_(client), deadline_(deadline) {}

  void set(const std::string& key, const std::vector<char>& data) override {
    Check(client_->Set(key, std::string(data.begin(), data.end()), deadline_));
  }
  std::vector<char> get(const std::string& key) override {
    const absl::StatusOr<std::string> value = client_->Get(key, deadline_);
    Check(value.status());
    return std::vector<char>(value->begin(), value->end());
  }
  void wait(const std::vector<std::string>& keys) override {
    for (const std::string& key : keys) Check(client_->Get(key, deadline_).status());
  }
  void wait(const std::vector<std::string>& keys, const std::chrono::milliseconds&) override {
    wait(keys);
  }

  [[nodiscard]] const absl::Status& status() const { return status_; }

 private:
  void Check(const absl::Status& status) {
    if (status.ok()) return;
    status_ = status;
    throw gloo::IoException(std::string(status.message()));
  }

  StoreClient* const client_;
  const Deadline deadline_;
  absl::Status status_;
};

class GlooCommunicator final : public Communicator {
 public:
  GlooCommunicator(const GlooOptions& options, std::shared_ptr<gloo::rendezvous::Context> context)
      : rank_(options.rank),
        size_(options.size),
        timeout_(options.timeout),
        context_(std::move(context)),
        staging_(kChunkBytes * static_cast<size_t>(size_)) {
    context_->setTimeout(Milliseconds(timeout_));
    for (int32_t peer = 0; peer < size_; ++peer) {
      if (peer == rank_) {
        sends_.push_back(nullptr);
        receives_.push_back(nullptr);
        continue;
      }
      sends_.push_back(context_->createUnboundBuffer(Staging(rank_), kChunkBytes));
      receives_.push_back(context_->createUnboundBuffer(Staging(peer), kChunkBytes));
    }
  }

  ~GlooCommunicator() override {
    sends_.clear();
    receives_.clear();
    CloseConnections();
  }

  int32_t rank() const override { return rank_; }
  int32_t size() const override { return size_; }

  absl::Status AllReduceSum(std::span<float> data) override {
    constexpr size_t kChunk = kChunkBytes / sizeof(float);
    for (size_t begin = 0; begin < data.size(); begin += kChunk) {
      const std::span<float> part = data.subspan(begin, std::min(kChunk, data.size() - begin));
      std::memcpy(Staging(rank_), part.data(), part.size_bytes());
      RETURN_IF_ERROR(Exchange(part.size_bytes(), kEveryRank));
      std::memcpy(part.data(), Staging(0), part.size_bytes());
      for (int32_t peer = 1; peer < size_; ++peer) {
        AddTo(part, reinterpret_cast<const float*>(Staging(peer)));
      }
    }
    return CheckAbort();
  }

  absl::Status AllGather(std::span<const std::byte> mine, std::span<std::byte> all) override {
    CHECK(all.size() == mine.size() * static_cast<size_t>(size_));
    for (size_t begin = 0; begin < mine.size(); begin += kChunkBytes) {
      const size_t bytes = std::min(kChunkBytes, mine.size() - begin);
      std::memcpy(Staging(rank_), mine.data() + begin, bytes);
      RETURN_IF_ERROR(Exchange(bytes, kEveryRank));
      for (int32_t peer = 0; peer < size_; ++peer) {
        std::memcpy(all.data() + static_cast<size_t>(peer) * mine.size() + begin, Staging(peer),
                    bytes);
      }
    }
    return CheckAbort();
  }

  absl::Status Broadcast(std::span<std::byte> data, int32_t root) override {
    CHECK(root >= 0 && root < size_);
    for (size_t begin = 0; begin < data.size(); begin += kChunkBytes) {
      const std::span<std::byte> part =
          data.subspan(begin, std::min(kChunkBytes, data.size() - begin));
      if (rank_ == root) std::memcpy(Staging(rank_), part.data(), part.size());
      RETURN_IF_ERROR(Exchange(part.size(), root));
      if (rank_ != root) std::memcpy(part.data(), Staging(root), part.size());
    }
    return CheckAbort();
  }

  void Abort() override {
    if (aborted_.exchange(true)) return;
    for (int32_t peer = 0; peer < size_; ++peer) {
      if (peer == rank_) continue;
      receives_[peer]->abortWaitRecv();
      sends_[peer]->abortWaitSend();
    }
    CloseConnections();  // which is how the other ranks learn of it
  }

 private:
  static constexpr int32_t kEveryRank = -1;

  std::byte* Staging(int32_t rank) {
    return staging_.data() + static_cast<size_t>(rank) * kChunkBytes;
  }

  absl::Status CheckAbort() const {
    return aborted_.load() ? absl::AbortedError("the group was aborted") : absl::OkStatus();
  }

  // Sends the own staging chunk from `sender` (or from everyone) to all and waits for theirs. Each
  // pair is connected directly: one hop, which is what small messages want.
  absl::Status Exchange(size_t bytes, int32_t sender) {
    RETURN_IF_ERROR(CheckAbort());
    const Deadline begin = std::chrono::steady_clock::now();
    std::string error;
    try {
      if (TryExchange(bytes, sender)) return absl::OkStatus();
    } catch (const std::exception& exception) {
      error = exception.what();
    }
    const bool was_aborted = aborted_.load();
    Abort();
    if (was_aborted) return absl::AbortedError("the group was aborted");
    if (std::chrono::steady_clock::now() - begin >= timeout_) {
      return absl::DeadlineExceededError(absl::StrCat("rank ", rank_, " waited ",
                                                      Milliseconds(timeout_).count(),
                                                      " ms for its peers in a collective"));
    }
    return absl::AbortedError(absl::StrCat("rank ", rank_, " lost a peer: ", error));
  }

  bool TryExchange(size_t bytes, int32_t sender) {
    const uint64_t slot = ++round_;
    const auto timeout = Milliseconds(timeout_);
    const auto receives_from = [&](int32_t peer) {
      return peer != rank_ && (sender == kEveryRank || sender == peer);
    };
    const bool sending = sender == kEveryRank || sender == rank_;
    for (int32_t peer = 0; peer < size_; ++peer) {
      if (receives_from(peer)) receives_[peer]->recv(peer, slot, 0, bytes);
    }
    for (int32_t peer = 0; sending && peer < size_; ++peer) {
      if (peer != rank_) sends_[peer]->send(peer, slot, 0, bytes);
    }
    bool complete = true;
    for (int32_t peer = 0; peer < size_; ++peer) {
      if (receives_from(peer)) complete &= receives_[peer]->waitRecv(nullptr, timeout);
    }
    for (int32_t peer = 0; sending && peer < size_; ++peer) {
      if (peer != rank_) complete &= sends_[peer]->waitSend(nullptr, timeout);
    }
    return complete;
  }

  void CloseConnections() {
    try {
      context_->closeConnections();
    } catch (const std::exception&) {
      // Closed already: nothing is left to do.
    }
  }

  const int32_t rank_;
  const int32_t size_;
  const Duration timeout_;
  std::shared_ptr<gloo::rendezvous::Context> context_;
  std::vector<std::byte> staging_;  // [size, kChunkBytes]
  std::vector<std::unique_ptr<gloo::transport::UnboundBuffer>> sends_;
  std::vector<std::unique_ptr<gloo::transport::UnboundBuffer>> receives_;
  std::atomic<bool> aborted_{false};
  uint64_t round_ = 0;
};

void IgnoreBrokenPipes() {
  struct sigaction current {};
  if (sigaction(SIGPIPE, nullptr, &current) == 0 && current.sa_handler == SIG_DFL) {
    signal(SIGPIPE, SIG_IGN);
  }
}

gloo::transport::tcp::attr DeviceAddress(const GlooOptions& options) {
  gloo::transport::tcp::attr attribute;
  attribute.hostname = options.bind_address;
  if (options.bind_address.empty()) attribute.iface = options.interface;
  if (attribute.hostname.empty() && attribute.iface.empty()) attribute.hostname = "127.0.0.1";
  return attribute;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> MakeGlooCommunicator(const GlooOptions& options) {
  CHECK(options.size >= 1 && options.rank >= 0 && options.rank < options.size);
  if (options.size == 1) return MakeSelfCommunicator();
  IgnoreBrokenPipes();
  const Deadline deadline = std::chrono::steady_clock::now() + options.connect_timeout;
  ASSIGN_OR_RETURN(auto client, StoreClient::Connect(options.store_host, options.store_port,
                                                     options.group_key, deadline));
  RendezvousStore store(client.get(), deadline);
  try {
    auto device = gloo::transport::tcp::CreateDevice(DeviceAddress(options));
    auto context = std::make_shared<gloo::rendezvous::Context>(options.rank, options.size);
    context->setTimeout(Milliseconds(options.connect_timeout));
    context->connectFullMesh(store, device);
    return std::make_unique<GlooCommunicator>(options, std::move(context));
  } catch (const std::exception& exception) {
    if (!store.status().ok()) return store.status();
    return absl::UnavailableError(
        absl::StrCat("rank ", options.rank, " cannot connect to its peers: ", exception.what()));
  }
}

}  // namespace nibble::collectives
