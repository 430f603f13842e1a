// Many tokens with AMX: a tile register of 16 rows x 16 tokens of sums takes 16 rows x 32 columns of the weight and 32
// columns x 16 tokens of x in one instruction. Sparse tiles are expanded with zeros first. A zero times an infinity is
// no zero, so x that is not all finite goes to pairs.h, as does everything if the first use finds AMX wrong.
// Not run on hardware: measured nowhere, checked with the emulated registers.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <optional>

#include "pairs.h"

namespace patch_kernels::cpu {
namespace {

constexpr int kRegisters = 8;
constexpr int kRegisterRows = 16, kRegisterBytes = 64;  // of a row
constexpr int kRegisterColumns = kRegisterBytes / kValueBytes;
constexpr int kRegisterSize = kRegisterRows * kRegisterBytes;
constexpr int kSteps = kTile / kRegisterColumns;   // registers over the columns of a tile
constexpr int kRowBlocks = kTile / kRegisterRows;  // and over its rows
constexpr int kRegisterSums = kRegisterRows * kVectorTokens;

#if defined(PK_AMX_EMULATED)
// The tile registers in plain C++, for machines without.
class TileRegisters {
 public:
  template <int R>
  void load(const void* from) {
    memcpy(registers_[R], from, kRegisterSize);
  }
  template <int R>
  void store(void* to) const {
    memcpy(to, registers_[R], kRegisterSize);
  }
  // C[row][token] += the sum over pairs of A[row][pair] . B[pair][token].
  template <int C, int A, int B>
  void multiply() {
    float c[kRegisterRows][kVectorTokens];
    BFloat16 a[kRegisterRows][kRegisterColumns], b[kRegisterRows][kVectorTokens][2];
    memcpy(c, registers_[C], kRegisterSize);
    memcpy(a, registers_[A], kRegisterSize);
    memcpy(b, registers_[B], kRegisterSize);
    for (int row = 0; row < kRegisterRows; ++row) {
      for (int k = 0; k < kRegisterColumns; ++k) {
        for (int token = 0; token < kVectorTokens; ++token) {
          c[row][token] += load_as<float>(a[row][k]) * load_as<float>(b[k / 2][token][k % 2]);
        }
      }
    }
    memcpy(registers_[C], c, kRegisterSize);
  }

 private:
  uint8_t registers_[kRegisters][kRegisterSize];
};
#else
// The tile registers of this thread, while this lives (Intel SDM, "Intel AMX instruction set reference").
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } configuration;
    static_assert(sizeof(configuration) == 64, "what ldtilecfg reads");
    for (int i = 0; i < kRegisters; ++i) {
      configuration.row_bytes[i] = kRegisterBytes;
      configuration.rows[i] = kRegisterRows;
    }
    asm volatile("ldtilecfg %0" ::"m"(configuration));
  }
  TileRegisters(const TileRegisters&) = delete;
  ~TileRegisters() { asm volatile("tilerelease"); }

  // Assembly, since the intrinsics of GCC take no template parameter as a register. The memory they touch is not named
  // but all of it.
  template <int R>
  void load(const void* from) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(int64_t{kRegisterBytes}), "i"(R) : "memory");
  }
  template <int R>
  void store(void* to) const {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(int64_t{kRegisterBytes}), "i"(R) : "memory");
  }
  template <int C, int A, int B>
  void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};
#endif

// Nibbles i0 | i1 << 2 to the columns that they keep, one bit each.
inline __m512i keep_bits(__m512i nibbles) {
  const __m512i ones = _mm512_set1_epi8(0x11);
  const __m512i first0 = nibbles, first1 = _mm512_srli_epi16(nibbles, 1);
  const __m512i second0 = _mm512_srli_epi16(nibbles, 2), second1 = _mm512_srli_epi16(nibbles, 3);
  const __m512i is1 = _mm512_or_si512(_mm512_andnot_si512(first1, first0), _mm512_andnot_si512(second1, second0));
  const __m512i is2 = _mm512_or_si512(_mm512_andnot_si512(first0, first1), _mm512_andnot_si512(second0, second1));
  const __m512i kept0 = _mm512_andnot_si512(_mm512_or_si512(first0, first1), ones);
  const __m512i kept1 = _mm512_slli_epi16(_mm512_and_si512(is1, ones), 1);
  const __m512i kept2 = _mm512_slli_epi16(_mm512_and_si512(is2, ones), 2);
  const __m512i kept3 = _mm512_slli_epi16(_mm512_and_si512(_mm512_and_si512(second0, second1), ones), 3);
  return _mm512_or_si512(_mm512_or_si512(kept0, kept1), _mm512_or_si512(kept2, kept3));
}

class Amx {
 public:
  static constexpr int kTokensOfItem = 128;
  static constexpr int64_t kScratchOfValue = sizeof(uint16_t);

  Amx(const Tokens& x, ParallelFor parallel) : x_(x, parallel) {}

  class Worker {
   public:
    explicit Worker(const Amx& amx) : x_(amx.x_) {}

    void run(const Item& item) {
      const Matrix& matrix = *item.matrix;
      const int blocks = static_cast<int>(ceil_div(item.tokens, kVectorTokens));
      memset(sums_, 0, sizeof(float) * kTile * kVectorTokens * blocks);
      TileCursor tile(matrix, item.tile_row);
      for (int64_t c = 0; c < matrix.tile_cols; ++c, tile.next()) {
        for (int i = 0; i < kRowBlocks; ++i) {
          if (tile.is_sparse()) {
            expand_sparse(tile.at, i);
          } else {
            copy_dense(tile.at, i);
          }
        }
        for (int block = 0; block < blocks; block += 2) {
          const int64_t first = item.token / kVectorTokens + block;
          const bool two = block + 1 < blocks;
          for (int i = 0; i < kRowBlocks; i += 2) {
            if (two) {
              multiply<true>(i, x_.tile(first, c), x_.tile(first + 1, c), block);
            } else {
              multiply<false>(i, x_.tile(first, c), nullptr, block);
            }
          }
        }
      }
      store_blocks(item, sums_);
    }

   private:
    // Rows [16i, 16i + 16) of a tile, the swizzle undone.
    void copy_dense(const uint8_t* tile, int i) {
      for (int r = 0; r < kRegisterRows; ++r) {
        const int s = r & 7;
        for (int step = 0; step < kSteps; ++step) {
          const uint8_t* at = tile + kSlotBytes * (step >> 1) + 128 * (kRegisterRows * i + r);
          put(i, step, r,
              _mm512_permutexvar_epi64(load512(kRow.order[s & 3]), load512(at + 64 * ((step & 1) ^ s >> 2))));
        }
      }
    }

    void expand_sparse(const uint8_t* tile, int i) {
      alignas(64) uint16_t keep[kMetaBytes / kRowBlocks / 2];  // where the metadata of these columns are
      for (int word = 0; word < kMetaBytes / kRowBlocks / 2; word += 32) {
        const uint8_t* metadata = tile + kSlotBytes + kMetaBytes / kRowBlocks * i;
        _mm512_store_si512(keep + word, keep_bits(load512(metadata + 2 * word)));
      }
      for (int r = 0; r < kRegisterRows; ++r) {
        const int s = r & 7;
        const uint8_t* row = tile + 128 * (kRegisterRows * i + r);
        for (int half = 0; half < 2; ++half) {
          const __m512i stored = load512(row + 64 * (half ^ s >> 2));
          const __m512i kept = _mm512_permutexvar_epi64(load512(kRow.order[s & 3]), stored);
          const __m512i later = _mm512_castsi256_si512(_mm512_extracti64x4_epi64(kept, 1));
          put(i, 2 * half, r, _mm512_maskz_expand_epi16(mask(keep, r, 4 * half), kept));
          put(i, 2 * half + 1, r, _mm512_maskz_expand_epi16(mask(keep, r, 4 * half + 2), later));
        }
      }
    }

    // Of the 32 columns of units u and u + 1.
    static __mmask32 mask(const uint16_t* keep, int r, int u) {
      const auto of = [&](int unit) {
        return static_cast<uint32_t>(keep[2 * meta_word(r, 4 * unit) + meta_shift(r, 4 * unit) / 16]);
      };
      return of(u) | of(u + 1) << 16;
    }

    void put(int i, int step, int r, __m512i columns) {
      _mm512_store_si512(weights_ + kRegisterSize * (kSteps * i + step) + kRegisterBytes * r, columns);
    }

    // Row blocks i and i + 1 with one or two blocks of tokens.
    template <bool kTwo>
    void multiply(int i, const uint16_t* x0, const uint16_t* x1, int block) {
      float *sums0 = sums_ + (block * kRowBlocks + i) * kRegisterSums, *sums1 = sums0 + kRowBlocks * kRegisterSums;
      registers_.load<0>(sums0);
      registers_.load<1>(sums0 + kRegisterSums);
      if constexpr (kTwo) {
        registers_.load<2>(sums1);
        registers_.load<3>(sums1 + kRegisterSums);
      }
      for (int step = 0; step < kSteps; ++step) {
        const uint8_t* weights = weights_ + kRegisterSize * (kSteps * i + step);
        registers_.load<4>(weights);
        registers_.load<5>(weights + kSteps * kRegisterSize);
        registers_.load<6>(x0 + kRegisterSize / kValueBytes * step);
        registers_.multiply<0, 4, 6>();
        registers_.multiply<1, 5, 6>();
        if constexpr (kTwo) {
          registers_.load<7>(x1 + kRegisterSize / kValueBytes * step);
          registers_.multiply<2, 4, 7>();
          registers_.multiply<3, 5, 7>();
        }
      }
      registers_.store<0>(sums0);
      registers_.store<1>(sums0 + kRegisterSums);
      if constexpr (kTwo) {
        registers_.store<2>(sums1);
        registers_.store<3>(sums1 + kRegisterSums);
      }
    }

    const BlockedTokens<2>& x_;
    TileRegisters registers_;
    alignas(64) uint8_t weights_[kTile * kTile * kValueBytes];  // [row block][step][row][32 columns]
    alignas(64) float sums_[kTile * kTokensOfItem];             // [block of tokens][row][token]
  };

 private:
  BlockedTokens<2> x_;  // pairs of columns: what the second operand takes
};

// y of a matrix of one tile row.
template <class Kernel>
std::vector<uint16_t> multiply_tile_row(TileLinearArgs args) {
  std::vector<uint16_t> y(args.tokens * args.weight.rows);
  args.y = y.data();
  const Tokens x(args);
  const Matrix matrix(args, x);
  const Kernel kernel(x, serial);
  const auto worker = std::make_unique<typename Kernel::Worker>(kernel);
  worker->run({&matrix, 0, 0, kTile, 0, static_cast<int>(args.tokens)});
  return y;
}

// On whole numbers, whose sums are the same in any order: a dense and a sparse tile, two blocks of tokens and one.
inline bool amx_agrees_with_pairs() {
  constexpr int kCols = 2 * kTile, kTokens = 3 * kVectorTokens;
  const auto whole = [](size_t i) {
    BFloat16 out;
    store_as(static_cast<float>((i * 2654435761u >> 8) % 15) - 7.0f, out);
    return out.bits;
  };
  std::vector<uint16_t> weight(kTile * kCols), x(kTokens * kCols);
  std::unique_ptr<bool[]> keep(new bool[weight.size()]);
  for (size_t i = 0; i < weight.size(); ++i) {
    const size_t pruned = i / kGroup % kGroup;
    weight[i] = whole(i);
    keep[i] = i % kCols < kTile || (i % kGroup != pruned && i % kGroup != (pruned + 1 + i / kCols % 3) % kGroup);
  }
  for (size_t i = 0; i < x.size(); ++i) x[i] = whole(weight.size() + i);
  const uint8_t is_sparse[2] = {0, 1};
  std::vector<uint8_t> payload(payload_bytes(is_sparse, 2));
  pack_tiles(weight.data(), keep.get(), is_sparse, kTile, kCols, payload.data(), serial);
  const TileLinearArgs args{x.data(),        nullptr, nullptr, kTokens, {payload.data(), is_sparse, kTile, kCols},
                            DType::kBFloat16};
  return multiply_tile_row<Amx>(args) == multiply_tile_row<Pairs>(args);
}

inline bool all_finite(const Tokens& x, ParallelFor parallel) {
  std::atomic<bool> finite{true};
  parallel_over(parallel, x.count, [&](int64_t begin, int64_t end) {
    unsigned largest = 0;
    for (int64_t t = begin; t < end; ++t) {
      for (const uint16_t *at = x.row(t), *last = at + x.cols; at < last; ++at)
        largest = std::max(largest, *at & 0x7FFFu);
    }
    if (largest >= 0x7F80u) finite = false;
  });
  return finite;
}

class AmxOrPairs {
 public:
  static constexpr int kTokensOfItem = Amx::kTokensOfItem, kLeastTokens = 2 * kVectorTokens;  // of an item
  static constexpr int kLeastRows = kTile;
  static constexpr int64_t kScratchOfValue = Amx::kScratchOfValue;

  AmxOrPairs(const Tokens& x, ParallelFor parallel) {
    static const bool amx_is_right = amx_agrees_with_pairs();
    if (amx_is_right && all_finite(x, parallel)) {
      amx_.emplace(x, parallel);
    } else {
      pairs_.emplace(x, parallel);
    }
  }

  class Worker {
   public:
    explicit Worker(const AmxOrPairs& kernel) {
      if (kernel.amx_) {
        amx_.emplace(*kernel.amx_);
      } else {
        pairs_.emplace(*kernel.pairs_);
      }
    }

    void run(const Item& item) {
      if (amx_) return amx_->run(item);
      for (int t = 0; t < item.tokens; t += Pairs::kTokensOfItem) {
        Item part = item;
        part.token += t;
        part.tokens = std::min(Pairs::kTokensOfItem, item.tokens - t);
        pairs_->run(part);
      }
    }

   private:
    std::optional<Amx::Worker> amx_;
    std::optional<Pairs::Worker> pairs_;
  };

 private:
  std::optional<Amx> amx_;
  std::optional<Pairs> pairs_;
};

}  // namespace
}  // namespace patch_kernels::cpu
