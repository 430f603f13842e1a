// The CPU kernels are compiled once per instruction set, each time in a namespace of its own, and picked at run time.
#pragma once

#include "../ops.h"

#define PK_DECLARE_ISA(isa)                                                                                        \
  namespace patch_kernels::cpu::isa {                                                                              \
  void tile_linear(const TileLinearArgs& args, ParallelFor parallel);                                              \
  void masked_weight(const MaskedWeightArgs& args, void* masked, double* sums, ParallelFor parallel);              \
  void masked_weight_backward(const MaskedWeightArgs& args, const MaskedWeightGrads& grads, ParallelFor parallel); \
  void adamw_step(const AdamWArgs& args, ParallelFor parallel);                                                    \
  }

PK_DECLARE_ISA(generic)
PK_DECLARE_ISA(avx2)
PK_DECLARE_ISA(avx512)
