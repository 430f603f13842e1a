// The maps of format/layout.h, gemm/wgmma.h and gemm/fragments.h against CuTe's layouts of the same instructions, while
// compiling: this file has no code. A CuTe layout takes (thread, value) or (row, column) to a number.
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/atom/mma_traits_sm90_gmma_sparse.hpp>
#include <cute/tensor.hpp>

#include "../gemm/fragments.h"
#include "../gemm/sm90.h"

namespace patch_kernels {
namespace {

using namespace cute;

// Rows x 64 elements of 16 bits with the 128-byte swizzle; offsets in elements. CuTe's own form swizzles bits of
// pointers, this one those of offsets.
template <int kRows>
using Swizzled = decltype(tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<half_t>{}, Shape<Int<kRows>, _64>{}));
template <int kRows>
constexpr int swizzled_bytes(int row, int column) {
  return kValueBytes * int(decltype(as_position_independent_swizzle_layout(Swizzled<kRows>{})){}(row, column));
}

constexpr bool slots_are_cutes() {
  for (int row = 0; row < kTile; ++row) {
    for (int k = 0; k < 64; ++k) {
      const int offset = swizzled_bytes<kTile>(row, k);
      if (dense_offset(row, k) != offset || dense_offset(row, 64 + k) != kSlotBytes + offset) return false;
      if (value_offset(row, k) != offset) return false;
    }
  }
  return true;
}
static_assert(slots_are_cutes(), "format/layout.h: a slot is not Layout_K_SW128_Atom");

// A descriptor steps through the layout without its swizzle, in units of 16 bytes.
template <int kRows>
constexpr int descriptor_step(int row, int column) {
  return kValueBytes * int(decltype(get_nonswizzle_portion(Swizzled<kRows>{})){}(row, column)) / 16;
}
static_assert(descriptor_step<kTile>(0, 16) == kAStep && descriptor_step<kTile>(0, 48) == 3 * kAStep,
              "kAStep: not a step of Layout_K_SW128_Atom");
static_assert(descriptor_step<kTile>(64, 0) == kABlockStep, "kABlockStep: not a step of Layout_K_SW128_Atom");
static_assert(descriptor_step<8>(0, 16) == kBDenseStep && descriptor_step<8>(0, 48) == 3 * kBDenseStep,
              "kBDenseStep: not a step of Layout_K_SW128_Atom");
static_assert(descriptor_step<8>(0, 32) == kBSparseStep, "kBSparseStep: not a step of Layout_K_SW128_Atom");

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11  // others cannot read bit fields while compiling
constexpr bool descriptor_is_cutes(uint32_t address) {
  const auto fields = __builtin_bit_cast(decltype(GmmaDescriptor::bitfield), wgmma_descriptor(address));
  const int eight_rows = descriptor_step<kTile>(8, 0);
  return fields.start_address_ == (address & 0x3FFFF) >> 4 && fields.leading_byte_offset_ == 1 &&
         fields.stride_byte_offset_ == eight_rows && fields.base_offset_ == 0 &&
         fields.layout_type_ == static_cast<int>(SM90::GMMA::LayoutType::B128);
}
static_assert(descriptor_is_cutes(0) && descriptor_is_cutes(1024) && descriptor_is_cutes(232448 - 1024) &&
                  descriptor_is_cutes(0x01000400),
              "wgmma_descriptor: not GmmaDescriptor");
#endif

// row + 64 * token. Modes of a layout are added, so each is evaluated once.
template <int kTokens>
constexpr bool accumulators_are_cutes() {
  constexpr SM90::GMMA::CLayout_64xN<kTokens> layout{};
  static_assert(size<0>(layout) == 128 && size<1>(layout) == kTokens / 2);
  int of_value[kTokens / 2] = {};
  for (int i = 0; i < kTokens / 2; ++i) of_value[i] = static_cast<int>(layout(0, i));
  for (int t = 0; t < 128; ++t) {
    const int of_thread = static_cast<int>(layout(t, 0));
    for (int i = 0; i < kTokens / 2; ++i) {
      if (fragment_row(t, i) + 64 * fragment_token(t, i) != of_thread + of_value[i]) return false;
    }
  }
  return true;
}
template <class... Config>
constexpr bool all_accumulators_are_cutes() {
  return (accumulators_are_cutes<Config::kBn>() && ...);
}
static_assert(all_accumulators_are_cutes<sm90::Decode8, sm90::Decode16, sm90::Decode32, sm90::Prefill64,
                                         sm90::Prefill128, sm90::Prefill160, sm90::Prefill176, sm90::Prefill192>(),
              "fragment_row, fragment_token: not CLayout_64xN");

// (thread, bit of its word) -> row + 64 * column, four bits a group of four columns. CuTe gives both pairs of a quad
// the same columns, as it only ever selects one; the format gives the second pair, selector 1, the next 32.
constexpr bool metadata_is_cutes() {
  constexpr SM90::GMMA::ELayout_64x32 layout{};
  for (int block = 0; block < 2; ++block) {
    for (int half = 0; half < 2; ++half) {
      for (int t = 0; t < 128; ++t) {
        for (int bit = 0; bit < 32; bit += 4) {
          const int place = static_cast<int>(layout(t, bit));
          const int row = 64 * block + place % 64, group = 16 * half + 8 * (t % 4 / 2) + place / 64 / kGroup;
          if (4 * meta_word(row, group) != kMetaBlockBytes * block + 8 * t + 4 * half) return false;
          if (meta_shift(row, group) != bit) return false;
        }
      }
    }
  }
  return true;
}
static_assert(metadata_is_cutes(), "meta_word, meta_shift, kMetaBlockBytes: not ELayout_64x32");

// Of ldmatrix and stmatrix: bit of register `word` of a lane -> bit of the rows, of which each lane names one.
struct RowByte {
  int lane, byte;
};
template <class RegisterLayout>
constexpr RowByte row_byte(int lane, int element) {
  const int bit = static_cast<int>(RegisterLayout{}(lane, 16 * element));
  return {bit / 128, bit % 128 / 8};
}
using Load = Copy_Traits<SM75_U32x4_LDSM_N>;
using Store = Copy_Traits<SM90_U16x8_STSM_T>;
static_assert(Load::SrcLayout{}(5, 0) == 5 * 128 && Store::DstLayout{}(5, 0) == 5 * 128, "a lane names 16 bytes");
using Mma = MMA_Traits<SM80_16x8x16_F32F16F16F32_TN>;

// row + 16 * column
constexpr bool weights_are_cutes() {
  for (int lane = 0; lane < 32; ++lane) {
    for (int v = 0; v < 8; ++v) {
      const RowByte from = row_byte<Load::DstLayout>(lane, v);
      const int place = static_cast<int>(Mma::ALayout{}(lane, v));
      for (int row0 = 0; row0 < kTile; row0 += 16) {
        for (int unit = 0; unit < 8; unit += 2) {
          const int at = weight_address(from.lane, row0, unit) + from.byte;
          if (at != swizzled_bytes<kTile>(row0 + place % 16, 8 * unit + place / 16)) return false;
        }
      }
    }
  }
  return true;
}
static_assert(weights_are_cutes(), "weight_address: not the A operand of SM80_16x8x16_F32F16F16F32_TN");

// token + 8 * column
constexpr bool tokens_are_cutes() {
  for (int lane = 0; lane < 32; ++lane) {
    for (int v = 0; v < 8; ++v) {
      const RowByte from = row_byte<Load::DstLayout>(lane, v);
      const int place = static_cast<int>(Mma::BLayout{}(lane, v % 4)), k16 = v / 4;
      for (int token0 = 0; token0 < 128; token0 += 8) {
        for (int unit = 0; unit < 8; unit += 4) {
          const int at = token_address(from.lane, token0, unit) + from.byte;
          if (at != swizzled_bytes<128>(token0 + place % 8, 8 * unit + 16 * k16 + place / 8)) return false;
        }
      }
    }
  }
  return true;
}
static_assert(tokens_are_cutes(), "token_address: not the B operand of SM80_16x8x16_F32F16F16F32_TN");

constexpr bool sums_are_cutes() {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      if (sum_row(lane, i) + 16 * sum_token(lane, i) != static_cast<int>(Mma::CLayout{}(lane, i))) return false;
    }
  }
  return true;
}
static_assert(sums_are_cutes(), "sum_row, sum_token: not CLayout of SM80_16x8x16_F32F16F16F32_TN");

// words[i] packs accumulators 2i and 2i + 1. y lies as its tensor map expects it: 16 tokens x 64 weight rows, swizzled.
constexpr bool stage_is_cutes() {
  for (int t = 0; t < 128; ++t) {
    for (int i = 0; i < 8; ++i) {
      const RowByte to = row_byte<Store::SrcLayout>(t % 32, i);
      const int at = stage_offset(t / 32 * 32 + to.lane) + to.byte;
      if (at != swizzled_bytes<16>(fragment_token(t, i), fragment_row(t, i))) return false;
    }
  }
  return true;
}
static_assert(stage_is_cutes(), "stage_offset: not SM90_U16x8_STSM_T into Layout_K_SW128_Atom");

}  // namespace
}  // namespace patch_kernels
