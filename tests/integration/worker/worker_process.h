// A real nibble-worker with its ranks, as a test sees it from outside.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "nibble/worker/v1/worker.grpc.pb.h"

namespace nibble::testing {

// Killed with its ranks when this ends. Waits are bounded; a wait that is not met is a failure of
// the test that goes on.
class WorkerProcess {
 public:
  // Starts the program with these flags beside --announce, and --listen and --metrics-listen on
  // free ports where they are not given. `prefix` stands before the program: what starts it.
  explicit WorkerProcess(std::vector<std::string> flags, std::vector<std::string> prefix = {});
  ~WorkerProcess();
  WorkerProcess(const WorkerProcess&) = delete;
  WorkerProcess& operator=(const WorkerProcess&) = delete;

  // Waits until it has announced its addresses. False when it ended instead.
  [[nodiscard]] bool AwaitServing(std::chrono::seconds limit = std::chrono::seconds(60));
  [[nodiscard]] const std::string& grpc_address() const { return grpc_; }
  [[nodiscard]] const std::string& metrics_address() const { return metrics_; }
  [[nodiscard]] worker::v1::WorkerService::Stub& stub();

  [[nodiscard]] pid_t pid() const { return pid_; }
  // Rank 0 first. Read once it serves.
  [[nodiscard]] const std::vector<pid_t>& ranks() const { return ranks_; }
  void Signal(int signal) const;

  // Its exit code, or 128 + the signal that killed it; nullopt when it still runs at the limit.
  [[nodiscard]] std::optional<int> AwaitExit(std::chrono::milliseconds limit);
  // Waits until neither it nor any of its ranks is left.
  [[nodiscard]] bool AwaitNobodyLeft(std::chrono::milliseconds limit);
  // What it printed on standard error.
  [[nodiscard]] std::string Errors() const;

  // The body of a GET on the metrics port; empty when it does not answer. *status gets the HTTP
  // status.
  [[nodiscard]] std::string Get(const std::string& path, int* status = nullptr) const;
  // The value of a metric with exactly these labels, or NaN.
  [[nodiscard]] double Metric(const std::string& name_and_labels) const;

 private:
  void FindRanks();

  std::string folder_;
  pid_t pid_ = -1;
  std::optional<int> exit_code_;
  std::vector<pid_t> ranks_;
  std::string grpc_, metrics_;
  std::unique_ptr<worker::v1::WorkerService::Stub> stub_;
};

// A request with every field set, greedy.
[[nodiscard]] worker::v1::GenerateRequest GreedyRequest(const std::vector<int32_t>& prompt,
                                                        int32_t max_tokens);

// One stream read to its end.
struct StreamResult {
  grpc::Status status;
  std::vector<int32_t> ids;
  std::optional<worker::v1::Finished> finished;
};
[[nodiscard]] StreamResult Generate(worker::v1::WorkerService::Stub* stub,
                                    const worker::v1::GenerateRequest& request);

}  // namespace nibble::testing
