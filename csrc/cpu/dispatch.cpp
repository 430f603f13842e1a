// Picks the best instruction set that this CPU has, or the one that PATCH_KERNELS_CPU_ISA names, and the kernel. What
// the variables may say is checked in Python (patch_kernels/_library.py).
#include <cstdlib>
#include <string>

#include "isa.h"

#if defined(PK_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(PK_ARM64)
#include <sys/auxv.h>
#endif

namespace patch_kernels::cpu {
namespace {

#define PK_ENUMERATE(name) name##_isa,
enum Isa { PK_ISAS(PK_ENUMERATE) kIsas };

#define PK_NAME(name) #name,
constexpr const char* kNames[kIsas] = {PK_ISAS(PK_NAME)};

#if defined(PK_X86)
bool has_f16c() {  // a name that __builtin_cpu_supports of clang 14 does not know
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

// The CPU has it and Linux lets this process have its registers (Documentation/arch/x86/xstate.rst).
bool has_amx_bf16() {
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24;  // CPUID.(7,0):EDX
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBFloat16) && (d & kTile) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

bool has([[maybe_unused]] Isa isa) {
#if defined(PK_X86)
  __builtin_cpu_init();
  if (isa == avx2_isa) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  }
  if (isa == avx512_isa) {
    return has(avx2_isa) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512cd");
  }
  if (isa == avx512_bf16_isa) return has(avx512_isa) && __builtin_cpu_supports("avx512bf16");
  const auto can_expand = [] { return has(avx512_bf16_isa) && __builtin_cpu_supports("avx512vbmi2"); };
  if (isa == amx_isa) return can_expand() && has_amx_bf16();
#if defined(PK_EMULATED_ISAS)
  if (isa == amx_emulated_isa) return can_expand();
#endif
#elif defined(PK_ARM64)
  constexpr unsigned long kBFloat16 = 1 << 14;  // HWCAP2_BF16, which older headers of Linux lack
  if (isa == neon_bf16_isa) return getauxval(AT_HWCAP2) & kBFloat16;
#endif
  return true;
}

Isa choose() {
  const char* asked = std::getenv("PATCH_KERNELS_CPU_ISA");
  Isa best = generic_isa;
  for (int i = 0; i < kIsas; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!has(isa)) continue;
    if (asked && kNames[i] == std::string(asked)) return isa;
    best = isa;
  }
  return best;
}

Isa chosen() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace

#define PK_OPS(isa) &isa::kOps,
constexpr const Ops* kOps[kIsas] = {PK_ISAS(PK_OPS)};

#define PK_DISPATCH(name, parameters, arguments) \
  void name parameters { kOps[chosen()]->name arguments; }
PK_CPU_OPS(PK_DISPATCH)

CpuKernel kernel_of(const TileLinearArgs& call) {
  static const std::string asked = [] {
    const char* name = std::getenv("PATCH_KERNELS_CPU_KERNEL");
    return std::string(name ? name : "");
  }();
  if (asked == "few") return CpuKernel::kFew;
  if (asked == "many") return CpuKernel::kMany;
  if (asked == "torch") return CpuKernel::kTorch;
  CpuKernel kernel;
  choose_kernel(call, kernel);
  return kernel;
}

const char* instruction_set() { return kNames[chosen()]; }

std::string instruction_sets() {
  std::string names;
  for (int i = 0; i < kIsas; ++i) {
    if (has(static_cast<Isa>(i))) names += (names.empty() ? "" : " ") + std::string(kNames[i]);
  }
  return names;
}

}  // namespace patch_kernels::cpu
