// What a nibble program's exit code says (docs/OPERATIONS.md has the same table).
#pragma once

namespace nibble {

enum ExitCode : int {
  kExitDrained = 0,
  kExitFailure = 1,  // a client command's request failed
  kExitConfiguration = 2,
  kExitModel = 3,
  kExitNoMemory = 4,  // no device, or the model does not fit
  kExitRankLost = 5,
  kExitHang = 6,
  kExitDeviceFault = 7,
};

}  // namespace nibble
