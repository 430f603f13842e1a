# The instruction sets of the CPU kernels, from the least to the best as in isa.h, and their compiler flags:
# PK_ISAS and PK_ISA_FLAGS_<isa>.
set(PK_ISAS generic)
set(PK_ISA_FLAGS_generic "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  add_compile_definitions(PK_X86)
  list(APPEND PK_ISAS avx2 avx512 avx512_bf16 amx)
  set(PK_ISA_FLAGS_avx2 -mavx2 -mfma -mf16c -mbmi -mbmi2)
  set(PK_ISA_FLAGS_avx512 ${PK_ISA_FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd
    -mprefer-vector-width=512)
  set(PK_ISA_FLAGS_avx512_bf16 ${PK_ISA_FLAGS_avx512} -mavx512bf16)
  set(PK_ISA_FLAGS_amx ${PK_ISA_FLAGS_avx512_bf16} -mavx512vbmi2 -DPK_AMX)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  add_compile_definitions(PK_ARM64)
  list(APPEND PK_ISAS neon neon_bf16)
  set(PK_ISA_FLAGS_neon -DPK_NEON)  # every compiler for 64-bit ARM has it: generic is the portable code all the same
  set(PK_ISA_FLAGS_neon_bf16 -DPK_NEON -march=armv8.2-a+bf16)
endif()
# GCC 12 finds its own AVX-512 headers uninitialized (bug 105593).
set(PK_CPU_FLAGS -fno-math-errno -fno-trapping-math -Wno-psabi -Wno-maybe-uninitialized -Wno-uninitialized)
