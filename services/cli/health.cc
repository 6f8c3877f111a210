#include "services/cli/health.h"

#include <grpcpp/grpcpp.h>

#include <chrono>

#include "grpc/health/v1/health.grpc.pb.h"

namespace nibble::cli {

bool IsServing(const std::string& address, Duration patience) {
  namespace health = ::grpc::health::v1;
  const auto stub =
      health::Health::NewStub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  context.set_wait_for_ready(true);
  context.set_deadline(std::chrono::system_clock::now() +
                       std::chrono::duration_cast<std::chrono::microseconds>(patience));
  health::HealthCheckRequest request;
  request.set_service("nibble.inference.v1.InferenceService");
  health::HealthCheckResponse response;
  return stub->Check(&context, request, &response).ok() &&
         response.status() == health::HealthCheckResponse::SERVING;
}

}  // namespace nibble::cli
