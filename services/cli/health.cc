#include "services/cli/health.h"

#include <httplib.h>

#include <chrono>

#include "base/host_port.h"

namespace nibble::cli {

bool IsServing(const std::string& address, Duration patience) {
  const auto where = ParseHostPort(address);
  if (!where.ok()) return false;
  httplib::Client client(where->host, where->port);
  const auto limit = std::chrono::duration_cast<std::chrono::microseconds>(patience);
  client.set_connection_timeout(limit);
  client.set_read_timeout(limit);
  const httplib::Result result = client.Get("/readyz");
  return result && result->status == 200;
}

}  // namespace nibble::cli
