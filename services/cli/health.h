// Asks a server by the standard health service whether it takes requests.
#pragma once

#include <string>

#include "base/clock.h"

namespace nibble::cli {

// Blocks for `patience` at most; a server that does not answer does not serve.
[[nodiscard]] bool IsServing(const std::string& address, Duration patience);

}  // namespace nibble::cli
