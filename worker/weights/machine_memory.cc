#include "worker/weights/machine_memory.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <limits>

#include "absl/strings/str_cat.h"
#include "base/units.h"

namespace nibble::weights {
namespace {

constexpr const char* kGroupLimitFile = "/sys/fs/cgroup/memory.max";

}  // namespace

int64_t MachineMemory() {
  int64_t bytes = std::numeric_limits<int64_t>::max();
  const int64_t pages = sysconf(_SC_PHYS_PAGES);
  const int64_t page = sysconf(_SC_PAGESIZE);
  if (pages > 0 && page > 0) bytes = pages * page;
  int64_t limit = 0;
  // "max", where there is no limit, is no number.
  if (std::ifstream(kGroupLimitFile) >> limit && limit > 0) bytes = std::min(bytes, limit);
  return bytes;
}

absl::Status CheckFits(const MemoryPlan& plan, int64_t machine_bytes) {
  int64_t weights = 0;
  int64_t kv = 0;
  int64_t total = 0;
  for (const RankMemoryPlan& rank : plan.ranks) {
    weights += rank.weight_bytes;
    kv += rank.kv_block_bytes * plan.kv_blocks;
    total += rank.weight_bytes + rank.activation_bytes + rank.workspace_bytes;
  }
  total += kv;
  if (total <= machine_bytes) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat(
      "the model needs ", FormatBytes(total), " on ", plan.ranks.size(),
      plan.ranks.size() == 1 ? " rank" : " ranks", ": weights ", FormatBytes(weights), ", ",
      plan.kv_blocks, " KV blocks a rank ", FormatBytes(kv), ", the rest ",
      FormatBytes(total - weights - kv), "; this machine has ", FormatBytes(machine_bytes)));
}

}  // namespace nibble::weights
