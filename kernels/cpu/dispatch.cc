#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>

#include "kernels/cpu/levels.h"

namespace nibble::cpu {
namespace {

struct CpuidResult {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

CpuidResult Cpuid(uint32_t leaf, uint32_t subleaf) {
  CpuidResult r;
  if (__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx) == 0) return {};
  return r;
}

constexpr bool Bit(uint32_t word, int bit) { return ((word >> bit) & 1U) != 0; }

// The register states that the operating system saves (XCR0), 0 without XSAVE.
uint64_t SavedStates() {
  constexpr int kOsXsave = 27;
  if (!Bit(Cpuid(1, 0).ecx, kOsXsave)) return 0;
  uint32_t low = 0;
  uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

bool Saves(uint64_t states, uint64_t mask) { return (states & mask) == mask; }

bool HasAvx2() {
  const CpuidResult one = Cpuid(1, 0);
  return Saves(SavedStates(), 0x6) && Bit(Cpuid(7, 0).ebx, 5) && Bit(one.ecx, 12) &&
         Bit(one.ecx, 29);
}

bool HasAvx512Vnni() {
  const CpuidResult seven = Cpuid(7, 0);
  return HasAvx2() && Saves(SavedStates(), 0xe6) && Bit(seven.ebx, 16) && Bit(seven.ebx, 17) &&
         Bit(seven.ebx, 30) && Bit(seven.ebx, 31) && Bit(seven.ecx, 11);
}

// Linux lets a process touch tile registers only after it has asked; the answer holds for the
// whole process, and asking again changes nothing.
bool RequestTilePermission() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool HasAmx() {
  const CpuidResult seven = Cpuid(7, 0);
  return HasAvx512Vnni() && Saves(SavedStates(), 0x60000) && Bit(seven.edx, 24) &&
         Bit(seven.edx, 25) && RequestTilePermission();
}

}  // namespace

std::string_view IsaLevelName(IsaLevel level) {
  switch (level) {
    case IsaLevel::kReference:
      return "reference";
    case IsaLevel::kAvx2:
      return "avx2";
    case IsaLevel::kAvx512Vnni:
      return "avx512_vnni";
    case IsaLevel::kAmx:
      return "amx";
  }
  return "unknown";
}

bool IsaLevelSupported(IsaLevel level) {
  // Asked once: on a virtual machine every CPUID is a trip to the hypervisor (tens of us).
  static const bool has_avx2 = HasAvx2();
  static const bool has_avx512_vnni = HasAvx512Vnni();
  static const bool has_amx = HasAmx();
  switch (level) {
    case IsaLevel::kReference:
      return true;
    case IsaLevel::kAvx2:
      return has_avx2;
    case IsaLevel::kAvx512Vnni:
      return has_avx512_vnni;
    case IsaLevel::kAmx:
      return has_amx;
  }
  return false;
}

IsaLevel BestIsaLevel() {
  for (const IsaLevel level : {IsaLevel::kAmx, IsaLevel::kAvx512Vnni, IsaLevel::kAvx2}) {
    if (IsaLevelSupported(level)) return level;
  }
  return IsaLevel::kReference;
}

const Kernels& GetKernels(IsaLevel level) {
  if (!IsaLevelSupported(level)) std::abort();
  switch (level) {
    case IsaLevel::kReference:
      return kReferenceKernels;
    case IsaLevel::kAvx2:
      return kAvx2Kernels;
    case IsaLevel::kAvx512Vnni:
      return kAvx512Kernels;
    case IsaLevel::kAmx: {
      static const Kernels amx_kernels = AmxKernels();
      return amx_kernels;
    }
  }
  std::abort();
}

}  // namespace nibble::cpu
