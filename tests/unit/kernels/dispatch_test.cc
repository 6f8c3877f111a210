// Levels by name, and that forcing each one works on a machine that has it.
#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>
#include <sstream>
#include <string>

#include "tests/unit/kernels/kernel_data.h"

namespace nibble::cpu {
namespace {

// The flags of the first processor, as the kernel prints them.
std::string CpuFlags() {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line)) {
    if (line.rfind("flags", 0) == 0) return line + " ";
  }
  return "";
}

bool HasFlags(const std::string& flags, std::initializer_list<const char*> names) {
  for (const char* name : names) {
    if (flags.find(std::string(" ").append(name).append(" ")) == std::string::npos) return false;
  }
  return true;
}

TEST(DispatchTest, SupportAgreesWithWhatTheKernelReports) {
  const std::string flags = CpuFlags();
  ASSERT_FALSE(flags.empty());
  const bool avx2 = HasFlags(flags, {"avx2", "fma", "f16c"});
  const bool avx512 =
      avx2 && HasFlags(flags, {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_vnni"});
  EXPECT_TRUE(IsaLevelSupported(IsaLevel::kReference));
  EXPECT_EQ(IsaLevelSupported(IsaLevel::kAvx2), avx2);
  EXPECT_EQ(IsaLevelSupported(IsaLevel::kAvx512Vnni), avx512);
  if (!HasFlags(flags, {"amx_tile", "amx_int8"})) {
    EXPECT_FALSE(IsaLevelSupported(IsaLevel::kAmx));
  }
}

TEST(DispatchTest, EveryLevelHasACompleteTable) {
  for (const IsaLevel level :
       {IsaLevel::kReference, IsaLevel::kAvx2, IsaLevel::kAvx512Vnni, IsaLevel::kAmx}) {
    if (!IsaLevelSupported(level)) {
      std::fprintf(stderr, "NOT RUN: kernel tests at level %s (this machine lacks it)\n",
                   std::string(IsaLevelName(level)).c_str());
      continue;
    }
    const Kernels& kernels = GetKernels(level);
    EXPECT_EQ(kernels.level, level);
    EXPECT_NE(kernels.quantize, nullptr);
    EXPECT_NE(kernels.group_sums, nullptr);
    EXPECT_NE(kernels.gemm_w4_int8, nullptr);
    EXPECT_NE(kernels.gemm_w4_float, nullptr);
    EXPECT_NE(kernels.gemm_int8, nullptr);
    EXPECT_NE(kernels.gemm_dense, nullptr);
    EXPECT_NE(kernels.rms_norm, nullptr);
    EXPECT_NE(kernels.add, nullptr);
    EXPECT_NE(kernels.silu_mul, nullptr);
    EXPECT_NE(kernels.rope, nullptr);
    EXPECT_NE(kernels.write_kv, nullptr);
    EXPECT_NE(kernels.attention, nullptr);
  }
}

TEST(DispatchTest, TheBestLevelIsSupportedAndNamesAreDistinct) {
  EXPECT_TRUE(IsaLevelSupported(BestIsaLevel()));
  EXPECT_EQ(IsaLevelName(IsaLevel::kReference), "reference");
  EXPECT_EQ(IsaLevelName(IsaLevel::kAvx2), "avx2");
  EXPECT_EQ(IsaLevelName(IsaLevel::kAvx512Vnni), "avx512_vnni");
  EXPECT_EQ(IsaLevelName(IsaLevel::kAmx), "amx");
}

}  // namespace
}  // namespace nibble::cpu
