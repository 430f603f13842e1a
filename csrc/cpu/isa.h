// The CPU kernels are compiled once per instruction set, each time in a namespace of its own, and picked at run time.
#pragma once

#include "../ops.h"

namespace patch_kernels::cpu {
namespace generic {
PK_CPU_OPS(PK_DECLARE_OP)
}
namespace avx2 {
PK_CPU_OPS(PK_DECLARE_OP)
}
namespace avx512 {
PK_CPU_OPS(PK_DECLARE_OP)
}
}  // namespace patch_kernels::cpu
