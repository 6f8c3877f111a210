// The communicator of a group of one rank: nothing travels.
#pragma once

#include <memory>

#include "worker/collectives/communicator.h"

namespace nibble::collectives {

[[nodiscard]] std::unique_ptr<Communicator> MakeSelfCommunicator();

}  // namespace nibble::collectives
