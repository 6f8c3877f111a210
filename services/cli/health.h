// Asks a gateway on its HTTP port whether it takes requests: that port asks for no key and speaks
// clear text whatever the gRPC port does.
#pragma once

#include <string>

#include "base/clock.h"

namespace nibble::cli {

// `address` is that of /readyz, host:port. Blocks for twice `patience` at most; a server that does
// not answer does not serve.
[[nodiscard]] bool IsServing(const std::string& address, Duration patience);

}  // namespace nibble::cli
