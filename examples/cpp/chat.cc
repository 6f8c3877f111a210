// Asks a nibble server one question and prints the answer as it comes.
//
//   cmake -S examples/cpp -B build/example && cmake --build build/example
//   build/example/chat_example "Why is the sky blue?" 127.0.0.1:50051
//
// A server that speaks TLS: a third word, the file of who signs its certificate. One that asks for
// a key: put it into NIBBLE_API_KEY.

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <string>

#include "nibble/inference/v1/inference.grpc.pb.h"

namespace pb = nibble::inference::v1;

namespace {

std::shared_ptr<grpc::ChannelCredentials> Credentials(const std::string& ca) {
  if (ca.empty()) return grpc::InsecureChannelCredentials();
  std::ifstream file(ca);
  grpc::SslCredentialsOptions options;
  options.pem_root_certs.assign(std::istreambuf_iterator<char>(file), {});
  return grpc::SslCredentials(options);
}

grpc::Status Ask(const std::string& server, const std::string& ca, const std::string& question) {
  const std::unique_ptr<pb::InferenceService::Stub> stub =
      pb::InferenceService::NewStub(grpc::CreateChannel(server, Credentials(ca)));
  pb::ChatStreamRequest request;
  pb::ChatMessage* message = request.mutable_request()->add_messages();
  message->set_role("user");
  message->set_content(question);
  request.mutable_request()->mutable_stopping()->set_max_tokens(64);

  grpc::ClientContext context;
  if (const char* key = std::getenv("NIBBLE_API_KEY")) {
    context.AddMetadata("authorization", std::string("Bearer ") + key);
  }
  // The deadline travels with the call; TryCancel would end it earlier.
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::minutes(1));
  const auto reader = stub->ChatStream(&context, request);
  pb::ChatStreamResponse event;
  while (reader->Read(&event)) {
    if (event.has_delta()) std::cout << event.delta().text() << std::flush;
    if (event.has_finished()) {
      const pb::Usage& usage = event.finished().usage();
      std::cerr << "\n[" << usage.prompt_tokens() << " + " << usage.completion_tokens()
                << " tokens]\n";
    }
  }
  return reader->Finish();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2 || argc > 4) {
    std::cerr << "usage: chat_example QUESTION [SERVER [CA_FILE]]\n";
    return 2;
  }
  const grpc::Status status =
      Ask(argc > 2 ? argv[2] : "127.0.0.1:50051", argc > 3 ? argv[3] : "", argv[1]);
  if (status.ok()) return 0;
  std::cerr << "status " << status.error_code() << ": " << status.error_message() << "\n";
  return 1;
}
