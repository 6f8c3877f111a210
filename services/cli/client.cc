#include "services/cli/client.h"

#include <cstdio>
#include <limits>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/exit_codes.h"
#include "base/grpc_status.h"

namespace nibble::cli {
namespace {

constexpr int64_t kUint32Max = std::numeric_limits<uint32_t>::max();

double Seconds(Duration duration) { return std::chrono::duration<double>(duration).count(); }

}  // namespace

void DeclareClientOptions(ConfigParser* parser, ClientOptions* options) {
  parser->Group("Server");
  DeclareConnectionOptions(parser, &options->connection);
  parser->String("model", &options->model, "Name of the model; empty: the only one");
  parser->Time("timeout", &options->timeout, {Duration::zero(), std::chrono::hours(24)},
               "Longest wait for the whole answer; 0: none");
  parser->Group("Answer");
  parser->Int("max_tokens", &options->max_tokens, {1, kUint32Max},
              "Longest answer; unset: to the context's end");
  parser->Number("temperature", &options->temperature, {0, 100}, "0 is greedy");
  parser->Number("top_p", &options->top_p, {0, 1}, "Share of probability sampled from");
  parser->Int("top_k", &options->top_k, {0, kUint32Max}, "Tokens sampled from; 0: all");
  parser->Int("seed", &options->seed, {0, std::numeric_limits<int64_t>::max()},
              "The same seed gives the same answer");
  parser->List("stop", &options->stop, "Texts that end the answer");
  parser->Bool("stats", &options->stats, "Say afterwards how many tokens and how fast");
}

void FillSampling(const ClientOptions& options, pb::SamplingParams* sampling) {
  if (options.temperature) sampling->set_temperature(static_cast<float>(*options.temperature));
  if (options.top_p) sampling->set_top_p(static_cast<float>(*options.top_p));
  if (options.top_k) sampling->set_top_k(static_cast<uint32_t>(*options.top_k));
  if (options.seed) sampling->set_seed(static_cast<uint64_t>(*options.seed));
}

void FillStopping(const ClientOptions& options, pb::StoppingCriteria* stopping) {
  if (options.max_tokens) stopping->set_max_tokens(static_cast<uint32_t>(*options.max_tokens));
  for (const std::string& stop : options.stop) stopping->add_stop(stop);
}

void PrepareCall(const ClientOptions& options, grpc::ClientContext* context) {
  AddKey(options.connection, context);
  if (options.timeout <= Duration::zero()) return;
  context->set_deadline(std::chrono::system_clock::now() +
                        std::chrono::duration_cast<std::chrono::microseconds>(options.timeout));
}

std::string SafeForTerminal(std::string_view text) {
  std::string safe;
  safe.reserve(text.size());
  for (size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    const bool control = (byte < 0x20 && byte != '\n' && byte != '\t') || byte == 0x7f;
    // U+0080 … U+009F are controls too; in UTF-8 they are C2 80 … C2 9F.
    const bool c1 =
        byte == 0xc2 && i + 1 < text.size() && static_cast<unsigned char>(text[i + 1]) < 0xa0;
    if (c1) ++i;
    safe += control || c1 ? ' ' : text[i];
  }
  return safe;
}

AnswerPrinter::AnswerPrinter(bool terminal, const Clock* clock)
    : terminal_(terminal), clock_(clock), start_(clock->Now()) {}

void AnswerPrinter::OnDelta(const pb::Delta& delta) {
  last_ = clock_->Now();
  if (first_ == Deadline::max()) first_ = last_;
  text_ += delta.text();
  const std::string shown = terminal_ ? SafeForTerminal(delta.text()) : delta.text();
  std::fwrite(shown.data(), 1, shown.size(), stdout);
  std::fflush(stdout);
}

std::string AnswerPrinter::End() {
  if (!text_.empty() && text_.back() != '\n') std::fputc('\n', stdout);
  std::fflush(stdout);
  const uint32_t tokens = finished_.usage().completion_tokens();
  if (tokens == 0 || first_ == Deadline::max()) return "no tokens";
  std::string stats =
      absl::StrFormat("%d prompt tokens, %d tokens, first after %.2f s",
                      finished_.usage().prompt_tokens(), tokens, Seconds(first_ - start_));
  // The rate between the first delta and the last.
  const double seconds = Seconds(last_ - first_);
  if (tokens > 1 && seconds > 0)
    absl::StrAppendFormat(&stats, ", %.1f tokens/s", (tokens - 1) / seconds);
  return stats;
}

template <typename Response>
absl::Status ShowStream(grpc::ClientReader<Response>* reader, AnswerPrinter* printer) {
  Response response;
  while (reader->Read(&response)) {
    if (response.has_delta()) printer->OnDelta(response.delta());
    if (response.has_finished()) printer->OnFinished(response.finished());
  }
  return FromGrpcStatus(reader->Finish());
}

template absl::Status ShowStream(grpc::ClientReader<pb::ChatStreamResponse>*, AnswerPrinter*);
template absl::Status ShowStream(grpc::ClientReader<pb::GenerateStreamResponse>*, AnswerPrinter*);

int ReportFailure(const char* command, const ClientOptions& options, const absl::Status& status) {
  const std::string reason = ErrorReason(status);
  std::string hint;
  // Without a reason of ours nobody answered at all.
  if (absl::IsUnavailable(status) && reason.empty()) {
    hint = absl::StrCat("\nIs a server at ", options.connection.server,
                        "? Start one: nibble serve MODEL_DIR");
  }
  std::fprintf(stderr, "nibble %s: %s%s%s: %s%s\n", command,
               absl::StatusCodeToString(status.code()).c_str(), reason.empty() ? "" : " ",
               reason.c_str(), SafeForTerminal(std::string(status.message())).c_str(),
               hint.c_str());
  return kExitFailure;
}

}  // namespace nibble::cli
