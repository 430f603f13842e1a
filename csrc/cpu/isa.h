// The CPU kernels are compiled once per instruction set, each time in a namespace of its own, and picked at run time.
#pragma once

#include "../ops.h"

// From the least to the best. OP(name). An emulated one is less than the least: used where it is asked for, in tests.
#if defined(PK_X86) && defined(PK_EMULATED_ISAS)
#define PK_ISAS(OP) OP(amx_emulated) OP(generic) OP(avx2) OP(avx512) OP(avx512_bf16) OP(amx)
#elif defined(PK_X86)
#define PK_ISAS(OP) OP(generic) OP(avx2) OP(avx512) OP(avx512_bf16) OP(amx)
#elif defined(PK_ARM64)
#define PK_ISAS(OP) OP(generic) OP(neon) OP(neon_bf16)
#else
#define PK_ISAS(OP) OP(generic)
#endif

namespace patch_kernels::cpu {

#define PK_POINTER(name, parameters, arguments) void(*name) parameters;
struct Ops {
  PK_CPU_OPS(PK_POINTER)
};
#undef PK_POINTER

#define PK_ADDRESS(name, parameters, arguments) name,
#define PK_DECLARE_ISA(isa)                      \
  namespace isa {                                \
  PK_CPU_OPS(PK_DECLARE_OP)                      \
  constexpr Ops kOps = {PK_CPU_OPS(PK_ADDRESS)}; \
  }
PK_ISAS(PK_DECLARE_ISA)
#undef PK_DECLARE_ISA
#undef PK_ADDRESS

}  // namespace patch_kernels::cpu
