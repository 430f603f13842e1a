// format/layout.h and gemm/wgmma.h against CuTe's layouts of the same instructions. Prints "N equal", or each
// difference and exits with 1. Built and run by test_fragments.py where the headers of the nvidia-cutlass wheel are
// installed.
#include <cstdio>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/atom/mma_traits_sm90_gmma_sparse.hpp>
#include <cute/tensor.hpp>

#include "gemm/wgmma.h"

namespace pk = patch_kernels;
using namespace cute;

static int equal = 0, different = 0;

static void expect(const char* what, int a, int b, int ours, int cutes) {
  if (ours == cutes) {
    ++equal;
    return;
  }
  if (++different <= 20) std::printf("%s(%d, %d): %d here, %d in CuTe\n", what, a, b, ours, cutes);
}

// Offsets in elements of 16 bits. CuTe's own form swizzles pointer bits; this one swizzles offsets.
static void check_slot() {
  const auto layout = as_position_independent_swizzle_layout(
      tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<half_t>{}, Shape<_128, _64>{}));
  for (int row = 0; row < 128; ++row) {
    for (int k = 0; k < 64; ++k) {
      const int offset = pk::kValueBytes * int(layout(row, k));
      expect("dense_offset", row, k, pk::dense_offset(row, k), offset);
      expect("dense_offset of slot 1", row, 64 + k, pk::dense_offset(row, 64 + k) - pk::kSlotBytes, offset);
      expect("value_offset", row, k, pk::value_offset(row, k), offset);
    }
  }
}

// (thread, value) -> row + 64 * token.
template <int N>
static void check_accumulators() {
  const SM90::GMMA::CLayout_64xN<N> layout{};
  static_assert(size(layout) == 64 * N);
  for (int t = 0; t < 128; ++t) {
    for (int i = 0; i < N / 2; ++i) {
      expect("fragment", t, i, pk::fragment_row(t, i) + 64 * pk::fragment_token(t, i), int(layout(t, i)));
    }
  }
}

// (thread, bit of its word) -> row + 64 * column, four bits a group of four columns. CuTe gives both pairs of a quad
// the same columns, as it only ever selects one; the format gives the second pair, selector 1, the next 32.
static void check_metadata() {
  const SM90::GMMA::ELayout_64x32 layout{};
  for (int tile_half = 0; tile_half < 4; ++tile_half) {
    const int block = tile_half / 2, half = tile_half % 2;
    for (int t = 0; t < 128; ++t) {
      const int selector = t % 4 / 2;
      for (int bit = 0; bit < 32; bit += 4) {
        const int row = 64 * block + int(layout(t, bit)) % 64, column = int(layout(t, bit)) / 64;
        const int group = 16 * half + 8 * selector + column / pk::kGroup;
        const int word = (pk::kMetaBlockBytes * block + 8 * t) / 4 + half;
        expect("meta_word", row, group, pk::meta_word(row, group), word);
        expect("meta_shift", row, group, pk::meta_shift(row, group), bit);
      }
    }
  }
}

int main() {
  check_slot();
  check_accumulators<8>();
  check_accumulators<16>();
  check_accumulators<32>();
  check_accumulators<64>();
  check_accumulators<128>();
  check_accumulators<160>();
  check_accumulators<176>();
  check_accumulators<192>();
  check_metadata();
  std::printf("%d equal\n", equal);
  return different ? 1 : 0;
}
