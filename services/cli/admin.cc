// `nibble drain` and `nibble undrain`: the gateway's admin service.
#include <chrono>
#include <cstdio>
#include <string>
#include <thread>

#include "base/exit_codes.h"
#include "base/grpc_status.h"
#include "nibble/admin/v1/admin.grpc.pb.h"
#include "services/cli/commands.h"
#include "services/cli/connection.h"

namespace nibble::cli {
namespace {

constexpr char kAdminAddress[] = "127.0.0.1:50061";
constexpr auto kCallTime = std::chrono::seconds(10);
constexpr auto kPoll = std::chrono::milliseconds(200);

struct AdminOptions {
  ConnectionOptions connection;
  Duration wait = Duration::zero();

  AdminOptions() { connection.server = kAdminAddress; }
};

// One call to the admin service; its response, or what went wrong on stderr.
template <typename Request, typename Response, typename Method>
absl::Status Call(const ConnectionOptions& options, admin::v1::AdminService::Stub* stub,
                  Method method, Response* response) {
  grpc::ClientContext context;
  AddKey(options, &context);
  context.set_deadline(std::chrono::system_clock::now() + kCallTime);
  return FromGrpcStatus((stub->*method)(&context, Request(), response));
}

int Fail(const char* command, const absl::Status& status, int exit_code) {
  std::fprintf(stderr, "nibble %s: %s\n", command, std::string(status.message()).c_str());
  return exit_code;
}

// Drains, and asks again until nothing is left or `wait` is over.
int Drain(const AdminOptions& options, admin::v1::AdminService::Stub* stub) {
  const SteadyClock clock;
  const Deadline until = clock.Now() + options.wait;
  for (;;) {
    admin::v1::DrainResponse response;
    const absl::Status status = Call<admin::v1::DrainRequest>(
        options.connection, stub, &admin::v1::AdminService::Stub::Drain, &response);
    if (!status.ok()) return Fail("drain", status, kExitFailure);
    if (response.remaining() == 0 || clock.Now() >= until) {
      std::printf("draining, %u requests in flight\n", response.remaining());
      const bool late = options.wait > Duration::zero() && response.remaining() > 0;
      return late ? kExitFailure : kExitDrained;
    }
    std::this_thread::sleep_for(kPoll);
  }
}

}  // namespace

int RunDrain(int argc, const char* const* argv) {
  AdminOptions options;
  ConfigParser parser(CommandProgram("drain",
                                     "Lets a gateway take no new work; what runs finishes.",
                                     "nibble drain --server 127.0.0.1:50061 --wait 60s"));
  parser.Group("Admin service");
  DeclareConnectionOptions(&parser, &options.connection);
  parser.Time("wait", &options.wait, {Duration::zero(), std::chrono::hours(24)},
              "Until nothing is in flight, at most this long; 0: not at all");
  if (const auto code = parser.ParseMain(argc, argv)) return *code;
  const auto connection = Connect(options.connection);
  if (!connection.ok()) return Fail("drain", connection.status(), kExitConfiguration);
  return Drain(options, admin::v1::AdminService::NewStub(connection->channel).get());
}

int RunUndrain(int argc, const char* const* argv) {
  AdminOptions options;
  ConfigParser parser(CommandProgram("undrain", "Lets a drained gateway take work again.",
                                     "nibble undrain --server 127.0.0.1:50061"));
  parser.Group("Admin service");
  DeclareConnectionOptions(&parser, &options.connection);
  if (const auto code = parser.ParseMain(argc, argv)) return *code;
  const auto connection = Connect(options.connection);
  if (!connection.ok()) return Fail("undrain", connection.status(), kExitConfiguration);
  admin::v1::UndrainResponse response;
  const absl::Status status = Call<admin::v1::UndrainRequest>(
      options.connection, admin::v1::AdminService::NewStub(connection->channel).get(),
      &admin::v1::AdminService::Stub::Undrain, &response);
  if (!status.ok()) return Fail("undrain", status, kExitFailure);
  std::puts("taking work");
  return kExitDrained;
}

}  // namespace nibble::cli
