#include <unistd.h>

#include <cstdio>
#include <iostream>
#include <iterator>
#include <string>

#include "base/exit_codes.h"
#include "services/cli/client.h"
#include "services/cli/commands.h"

namespace nibble::cli {

int RunGenerate(int argc, const char* const* argv) {
  ClientOptions options;
  std::string prompt;
  ConfigParser parser(CommandProgram(
      "generate", "Continues a text, printing it as it is made.",
      "nibble generate --max-tokens 32 --temperature 0 \"The capital of France is\""));
  parser.Group("Prompt");
  parser.String("prompt", &prompt, "The text; without one, standard input").Positional();
  DeclareClientOptions(&parser, &options);
  if (const auto code = parser.ParseMain(argc, argv)) return *code;
  if (prompt.empty() && isatty(STDIN_FILENO) == 0) {
    prompt.assign(std::istreambuf_iterator<char>(std::cin), {});
  }

  pb::GenerateStreamRequest request;
  pb::GenerateRequest* generate = request.mutable_request();
  generate->set_model(options.model);
  generate->set_text(prompt);
  FillSampling(options, generate->mutable_sampling());
  FillStopping(options, generate->mutable_stopping());
  const SteadyClock clock;
  AnswerPrinter printer(isatty(STDOUT_FILENO) == 1, &clock);
  const auto connection = Connect(options.connection);
  if (!connection.ok()) {
    (void)ReportFailure("generate", options, connection.status());
    return kExitConfiguration;
  }
  const auto stub = pb::InferenceService::NewStub(connection->channel);
  grpc::ClientContext context;
  PrepareCall(options, &context);
  const auto reader = stub->GenerateStream(&context, request);
  const absl::Status status = ShowStream(reader.get(), &printer);
  const std::string stats = printer.End();
  if (!status.ok()) return ReportFailure("generate", options, status);
  if (options.stats) std::fprintf(stderr, "%s\n", stats.c_str());
  return kExitDrained;
}

}  // namespace nibble::cli
