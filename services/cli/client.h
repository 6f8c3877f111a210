// What `chat` and `generate` share: finding the server, the request's settings, showing a stream.
#pragma once

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "base/clock.h"
#include "base/config.h"
#include "nibble/inference/v1/inference.grpc.pb.h"
#include "services/cli/connection.h"

namespace nibble::cli {

namespace pb = ::nibble::inference::v1;

struct ClientOptions {
  ConnectionOptions connection;
  std::string model;
  Duration timeout = {};  // 0 = none
  bool stats = false;

  std::optional<int64_t> max_tokens;
  std::optional<double> temperature;
  std::optional<double> top_p;
  std::optional<int64_t> top_k;
  std::optional<int64_t> seed;
  std::vector<std::string> stop;
};

void DeclareClientOptions(ConfigParser* parser, ClientOptions* options);

// Sets the fields that were given.
void FillSampling(const ClientOptions& options, pb::SamplingParams* sampling);
void FillStopping(const ClientOptions& options, pb::StoppingCriteria* stopping);

// The key and the longest wait.
void PrepareCall(const ClientOptions& options, grpc::ClientContext* context);

// Control characters other than line breaks and tabs blanked: what a model says may not steer the
// terminal.
[[nodiscard]] std::string SafeForTerminal(std::string_view text);

// Prints an answer to stdout as it comes and remembers it. One thread.
class AnswerPrinter {
 public:
  // `terminal`: stdout is one.
  AnswerPrinter(bool terminal, const Clock* clock);

  void OnDelta(const pb::Delta& delta);
  void OnFinished(const pb::Finished& finished) { finished_ = finished; }
  // Ends the line. "19 prompt tokens, 32 tokens, first after 0.12 s, 45.2 tokens/s" for stderr.
  [[nodiscard]] std::string End();

  [[nodiscard]] const std::string& text() const { return text_; }

 private:
  bool terminal_;
  const Clock* clock_;
  Deadline start_;
  Deadline first_ = Deadline::max();
  Deadline last_ = Deadline::max();
  std::string text_;
  pb::Finished finished_;
};

// Reads the stream to its end through the printer. `context` is the call's.
template <typename Response>
[[nodiscard]] absl::Status ShowStream(grpc::ClientReader<Response>* reader, AnswerPrinter* printer);

// Says on stderr what went wrong with the server or the request; the exit code.
[[nodiscard]] int ReportFailure(const char* command, const ClientOptions& options,
                                const absl::Status& status);

extern template absl::Status ShowStream(grpc::ClientReader<pb::ChatStreamResponse>*,
                                        AnswerPrinter*);
extern template absl::Status ShowStream(grpc::ClientReader<pb::GenerateStreamResponse>*,
                                        AnswerPrinter*);

}  // namespace nibble::cli
