#include "worker/collectives/event_word.h"

#include <sched.h>

namespace nibble::collectives {

Duration SpinBudget(int32_t waiting_threads) {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  // More than 1024 CPUs make the call fail: such a machine has cores to spare.
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return kSpinMax;
  return waiting_threads <= CPU_COUNT(&allowed) ? kSpinMax : Duration::zero();
}

}  // namespace nibble::collectives
