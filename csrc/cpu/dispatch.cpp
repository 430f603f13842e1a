// Picks the best instruction set that this CPU has; PATCH_KERNELS_ISA=generic|avx2|avx512 asks for a lesser one.
#include <cstdlib>
#include <cstring>

#include "isa.h"

namespace patch_kernels::cpu {
namespace {

enum class Isa { kGeneric, kAvx2, kAvx512 };

Isa detect() {
#if defined(PK_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  const char* asked = std::getenv("PATCH_KERNELS_ISA");
  if (asked && !std::strcmp(asked, "generic")) return Isa::kGeneric;
  if (asked && !std::strcmp(asked, "avx2") && avx2) return Isa::kAvx2;
  return avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kGeneric;
#else
  return Isa::kGeneric;
#endif
}

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

}  // namespace

#if defined(PK_X86)
#define PK_DISPATCH(name, parameters, arguments) \
  void name parameters {                         \
    switch (isa()) {                             \
      case Isa::kAvx512:                         \
        return avx512::name arguments;           \
      case Isa::kAvx2:                           \
        return avx2::name arguments;             \
      case Isa::kGeneric:                        \
        return generic::name arguments;          \
    }                                            \
  }
#else
#define PK_DISPATCH(name, parameters, arguments) \
  void name parameters { return generic::name arguments; }
#endif

PK_CPU_OPS(PK_DISPATCH)

const char* instruction_set() {
  switch (isa()) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kGeneric:
      return "generic";
  }
  return "generic";
}

}  // namespace patch_kernels::cpu
