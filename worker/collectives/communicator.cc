#include "worker/collectives/communicator.h"

#include "base/check.h"
#include "base/status.h"
#include "kernels/cpu/kernels.h"

namespace nibble::collectives {

absl::Status Communicator::AllReduceAddNorm(const AddNorm& args) {
  const size_t hidden = args.norm_weight.size();
  CHECK(args.partial.size() == args.residual.size());
  CHECK(args.partial.size() == args.normed.size());
  CHECK(hidden > 0 && args.partial.size() % hidden == 0);
  // Every level gives the same bits; asking CPUID once is enough.
  static const cpu::Kernels& kernels = cpu::GetKernels(cpu::BestIsaLevel());
  RETURN_IF_ERROR(AllReduceSum(args.partial));
  kernels.add(args.residual.data(), args.partial.data(),
              static_cast<int64_t>(args.residual.size()));
  const cpu::FloatRows rows{.tokens = static_cast<int32_t>(args.residual.size() / hidden),
                            .columns = static_cast<int32_t>(hidden),
                            .values = args.residual.data(),
                            .stride = static_cast<int64_t>(hidden)};
  kernels.rms_norm(rows, args.norm_weight.data(), args.epsilon, args.normed.data(),
                   static_cast<int64_t>(hidden));
  return absl::OkStatus();
}

}  // namespace nibble::collectives
