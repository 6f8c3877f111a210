// The gateway's tie to one worker group: learns what it serves, fetches its tokenizer, follows its
// load, and comes back when it was lost.
#pragma once

#include <grpcpp/grpcpp.h>

#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "base/clock.h"
#include "services/gateway/core.h"
#include "services/gateway/generation_defaults.h"
#include "services/text/tokenizer.h"

namespace nibble::gateway {

using TokenizerFactory = std::function<absl::StatusOr<std::shared_ptr<const text::Tokenizer>>(
    const text::TokenizerFiles& files)>;

struct WorkerChannelOptions {
  Limits limits;
  std::shared_ptr<grpc::ChannelCredentials> tls = {};  // null: clear text
  std::string tls_name = {};  // in the group's certificate; empty = the address's
};
// "host:port" or "unix:path". Requests and the link share the channel.
[[nodiscard]] std::shared_ptr<grpc::Channel> NewWorkerChannel(const std::string& address,
                                                              const WorkerChannelOptions& options);

// Owns one thread, which blocks on the group: parsing a tokenizer takes seconds, and groups are
// few. Construction starts it, destruction ends it, also in the middle of a call.
class GroupLink {
 public:
  struct Options {
    size_t group = 0;
    SamplingSource sampling = SamplingSource::kModel;
    TokenizerFactory tokenizer_factory;
    Duration retry_min = std::chrono::milliseconds(100);  // doubles while the group stays away
    Duration retry_max = std::chrono::seconds(1);
  };
  GroupLink(Core* core, Options options);
  ~GroupLink();
  GroupLink(const GroupLink&) = delete;
  GroupLink& operator=(const GroupLink&) = delete;

 private:
  void Run();
  // Ends when the group is lost, OK only when the link stops.
  [[nodiscard]] absl::Status Follow();
  [[nodiscard]] absl::StatusOr<std::shared_ptr<const ServedModel>> Describe();
  [[nodiscard]] absl::Status FetchTokenizer(ServedModel* model);
  [[nodiscard]] absl::Status Watch();
  // Makes `context` the call that the destructor cancels; false when it is too late to start.
  [[nodiscard]] bool Begin(grpc::ClientContext* context, Duration timeout);
  void End();
  void Report(const absl::Status& status);

  Core& core_;
  const Options options_;
  std::string last_report_;  // the link's thread's
  absl::Mutex mutex_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  grpc::ClientContext* context_ ABSL_GUARDED_BY(mutex_) = nullptr;
  std::thread thread_;
};

}  // namespace nibble::gateway
