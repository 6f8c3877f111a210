// What happens to the TLS files of one port or kind of channel; may live in shared memory.
#pragma once

#include "base/stats.h"

namespace nibble {

struct TlsStats {
  Counter reloads_ok, reloads_failed;  // sets of files that were taken, or found not to hold
  Gauge stale;                         // 1 while the files do not hold, and what was before is used
  // When what is in use expires, in seconds of the Unix epoch: the first certificate of the own
  // chain, the last one of the authorities. 0: there is none.
  Gauge certificate_expires, ca_expires;
};

}  // namespace nibble
