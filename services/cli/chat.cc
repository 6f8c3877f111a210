#include <unistd.h>

#include <cstdio>
#include <iostream>
#include <iterator>
#include <string>

#include "base/exit_codes.h"
#include "services/cli/client.h"
#include "services/cli/commands.h"

namespace nibble::cli {
namespace {

struct ChatOptions {
  ClientOptions client;
  std::string system;
  std::string message;
};

void AddMessage(pb::ChatRequest* request, const char* role, const std::string& content) {
  pb::ChatMessage* message = request->add_messages();
  message->set_role(role);
  message->set_content(content);
}

// One question and its answer; both are kept in `conversation` where it went well.
absl::Status Ask(const ClientOptions& options, pb::InferenceService::Stub* stub,
                 const std::string& question, pb::ChatRequest* conversation) {
  pb::ChatStreamRequest request;
  *request.mutable_request() = *conversation;
  AddMessage(request.mutable_request(), "user", question);
  const SteadyClock clock;
  AnswerPrinter printer(isatty(STDOUT_FILENO) == 1, &clock);
  grpc::ClientContext context;
  PrepareCall(options, &context);
  const auto reader = stub->ChatStream(&context, request);
  absl::Status status = ShowStream(reader.get(), &printer);
  const std::string stats = printer.End();
  if (!status.ok()) return status;
  if (options.stats) std::fprintf(stderr, "%s\n", stats.c_str());
  AddMessage(conversation, "user", question);
  AddMessage(conversation, "assistant", printer.text());
  return status;
}

int Converse(const ClientOptions& options, pb::InferenceService::Stub* stub,
             pb::ChatRequest* conversation) {
  std::fputs("A line is a question; an empty one, or Ctrl-D, ends.\n", stderr);
  std::string question;
  while (std::fputs("> ", stderr), std::getline(std::cin, question) && !question.empty()) {
    const absl::Status status = Ask(options, stub, question, conversation);
    // A request that fails does not end the conversation: it can be asked again.
    if (!status.ok()) (void)ReportFailure("chat", options, status);
  }
  return kExitDrained;
}

}  // namespace

int RunChat(int argc, const char* const* argv) {
  ChatOptions options;
  ConfigParser parser(CommandProgram(
      "chat", "Asks a chat model; without a message, a conversation or standard input.",
      "nibble chat --server 127.0.0.1:50051 \"Why is the sky blue?\""));
  parser.Group("Conversation");
  parser.String("message", &options.message, "The question").Positional();
  parser.String("system", &options.system, "What the model is told first; empty: nothing");
  DeclareClientOptions(&parser, &options.client);
  if (const auto code = parser.ParseMain(argc, argv)) return *code;

  pb::ChatRequest conversation;
  conversation.set_model(options.client.model);
  FillSampling(options.client, conversation.mutable_sampling());
  FillStopping(options.client, conversation.mutable_stopping());
  if (!options.system.empty()) AddMessage(&conversation, "system", options.system);
  const auto connection = Connect(options.client.connection);
  if (!connection.ok()) {
    (void)ReportFailure("chat", options.client, connection.status());
    return kExitConfiguration;
  }
  const auto stub = pb::InferenceService::NewStub(connection->channel);
  if (options.message.empty() && isatty(STDIN_FILENO) == 1) {
    return Converse(options.client, stub.get(), &conversation);
  }
  if (options.message.empty()) {
    options.message.assign(std::istreambuf_iterator<char>(std::cin), {});
  }
  const absl::Status status = Ask(options.client, stub.get(), options.message, &conversation);
  return status.ok() ? kExitDrained : ReportFailure("chat", options.client, status);
}

}  // namespace nibble::cli
