// wgmma and wgmma.sp with both operands in shared memory and fp32 accumulators in registers: one function a shape.
// PTX ISA, "wgmma.mma_async" and "wgmma.mma_async.sp". The register lists are spelled out because inline PTX names
// operands by number.
#pragma once

#include <cstdint>

#include "packed_dtype.cuh"

namespace patch_kernels::cuda {

#define PK_NAMES_4 "%0, %1, %2, %3"
#define PK_REGS_4 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define PK_NAMES_8 \
  PK_NAMES_4       \
  ", %4, %5, %6, %7"
#define PK_REGS_8 PK_REGS_4, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define PK_NAMES_16 \
  PK_NAMES_8        \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define PK_REGS_16 \
  PK_REGS_8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define PK_NAMES_32 \
  PK_NAMES_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PK_REGS_32                                                                                                    \
  PK_REGS_16, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
      "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define PK_NAMES_64                                                                  \
  PK_NAMES_32                                                                        \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PK_REGS_64                                                                                                    \
  PK_REGS_32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
      "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),         \
      "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),         \
      "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define PK_NAMES_80 \
  PK_NAMES_64       \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define PK_REGS_80                                                                                                    \
  PK_REGS_64, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), \
      "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define PK_NAMES_88 \
  PK_NAMES_80       \
  ", %80, %81, %82, %83, %84, %85, %86, %87"
#define PK_REGS_88 \
  PK_REGS_80, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define PK_NAMES_96 \
  PK_NAMES_88       \
  ", %88, %89, %90, %91, %92, %93, %94, %95"
#define PK_REGS_96 \
  PK_REGS_88, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])

template <class Element, int kBn>
struct Wgmma;

// N tokens, R = N/2 registers; A, B, C, D: numbers of the operands behind them, which are the two descriptors, then the
// element's type, with the metadata word before it in the sparse form. Accumulators are always added to (scale-d is
// true): they are cleared at the start of an item.
#define PK_WGMMA(N, R, A, B, C, D)                                                                                \
  template <class Element>                                                                                        \
  struct Wgmma<Element, N> {                                                                                      \
    static __device__ __forceinline__ void dense(float (&d)[R], uint64_t a, uint64_t b) {                         \
      asm volatile(                                                                                               \
          "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                                              \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.%" #C ".%" #C " {" PK_NAMES_##R "}, %" #A ", %" #B      \
                                                                                          ", p, 1, 1, 0, 0;\n}\n" \
          : PK_REGS_##R                                                                                           \
          : "l"(a), "l"(b), "C"(Ptx<Element>::kType));                                                            \
    }                                                                                                             \
    template <int kSelector>                                                                                      \
    static __device__ __forceinline__ void sparse(float (&d)[R], uint64_t a, uint64_t b, uint32_t meta) {         \
      if constexpr (kSelector == 0) {                                                                             \
        PK_WGMMA_SP(N, R, A, B, C, D, "0")                                                                        \
      } else {                                                                                                    \
        PK_WGMMA_SP(N, R, A, B, C, D, "1")                                                                        \
      }                                                                                                           \
    }                                                                                                             \
  };
#define PK_WGMMA_SP(N, R, A, B, C, D, SELECTOR)                                          \
  asm volatile(                                                                          \
      "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                         \
      "wgmma.mma_async.sp.sync.aligned.m64n" #N "k32.f32.%" #D ".%" #D " {" PK_NAMES_##R \
      "}, %" #A ", %" #B ", %" #C ", " SELECTOR ", p, 1, 1, 0, 0;\n}\n"                  \
      : PK_REGS_##R                                                                      \
      : "l"(a), "l"(b), "r"(meta), "C"(Ptx<Element>::kType));

PK_WGMMA(8, 4, 4, 5, 6, 7)
PK_WGMMA(16, 8, 8, 9, 10, 11)
PK_WGMMA(32, 16, 16, 17, 18, 19)
PK_WGMMA(64, 32, 32, 33, 34, 35)
PK_WGMMA(128, 64, 64, 65, 66, 67)
PK_WGMMA(160, 80, 80, 81, 82, 83)
PK_WGMMA(176, 88, 88, 89, 90, 91)
PK_WGMMA(192, 96, 96, 97, 98, 99)

#undef PK_WGMMA_SP
#undef PK_WGMMA
#undef PK_NAMES_4
#undef PK_REGS_4
#undef PK_NAMES_8
#undef PK_REGS_8
#undef PK_NAMES_16
#undef PK_REGS_16
#undef PK_NAMES_32
#undef PK_REGS_32
#undef PK_NAMES_64
#undef PK_REGS_64
#undef PK_NAMES_80
#undef PK_REGS_80
#undef PK_NAMES_88
#undef PK_REGS_88
#undef PK_NAMES_96
#undef PK_REGS_96

}  // namespace patch_kernels::cuda
