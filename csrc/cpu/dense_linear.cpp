// y = x @ weight.T + bias for a few tokens and an ordinary weight, (rows, cols) one row after the other: the output
// head of a packed model reads as many bytes as all its sparse tiles, and torch's product reads them at two thirds of
// the speed. Compiled once per instruction set; without AVX-512 torch does it.
#include <atomic>

#include "isa.h"
#include "tile_linear.h"

#if defined(__AVX512BW__)
#include "lanes_avx512.h"
#endif

namespace patch_kernels::cpu::PK_ISA {
#if defined(__AVX512BW__)
namespace {

constexpr int64_t kMostTokens = 8;  // from there on torch's product is as fast
constexpr int kRowsOfItem = 32;
constexpr int kRowsAtOnce = 2;         // for each load of x
constexpr int64_t kBytesAhead = 8192;  // prefetched into L2

// kRowsAtOnce rows from `row` on times T tokens: the chain of a sum is the same for every T.
template <class Dot, int T>
void multiply(const DenseLinearArgs& args, int64_t row, int64_t token) {
  const int64_t cols = args.cols;
  const uint16_t* weight[kRowsAtOnce];
  for (int i = 0; i < kRowsAtOnce; ++i) {
    const int64_t r = row + i < args.rows ? row + i : args.rows - 1;
    weight[i] = static_cast<const uint16_t*>(args.weight) + r * cols;
  }
  const uint16_t* x = static_cast<const uint16_t*>(args.x) + token * cols;
  __m512 sums[kRowsAtOnce][T] = {};
  for (int64_t k = 0; k < cols; k += 32) {
    const __mmask32 real = cols - k < 32 ? (__mmask32{1} << (cols - k)) - 1 : ~__mmask32{0};
    __m512i of_x[T];
    for (int t = 0; t < T; ++t) of_x[t] = _mm512_maskz_loadu_epi16(real, x + t * cols + k);
    for (int i = 0; i < kRowsAtOnce; ++i) {
      prefetch(reinterpret_cast<const uint8_t*>(weight[i] + k) + kBytesAhead);
      const auto weights = Dot::weights(_mm512_maskz_loadu_epi16(real, weight[i] + k));
      for (int t = 0; t < T; ++t) sums[i][t] = Dot::dot(sums[i][t], of_x[t], weights);
    }
  }
  using Value = typename Dot::Storage;
  const Value* bias = static_cast<const Value*>(args.bias);
  for (int i = 0; i < kRowsAtOnce && row + i < args.rows; ++i) {
    for (int t = 0; t < T; ++t) {
      const float sum = _mm512_reduce_add_ps(sums[i][t]) + (bias ? load_as<float>(bias[row + i]) : 0.0f);
      store_as(sum, static_cast<Value*>(args.y)[(token + t) * args.rows + row + i]);
    }
  }
}

template <class Dot>
void item(const DenseLinearArgs& args, int64_t first) {
  const int64_t end = first + kRowsOfItem < args.rows ? first + kRowsOfItem : args.rows;
  for (int64_t row = first; row < end; row += kRowsAtOnce) {
    int64_t token = 0;
    for (; token + 4 <= args.tokens; token += 4) multiply<Dot, 4>(args, row, token);
    if (args.tokens - token >= 2) {
      multiply<Dot, 2>(args, row, token);
      token += 2;
    }
    if (token < args.tokens) multiply<Dot, 1>(args, row, token);
  }
}

template <class Dot>
void run(const DenseLinearArgs& args, ParallelFor parallel) {
  std::atomic<int64_t> next{0};
  parallel_over(parallel, ceil_div(args.rows, kRowsOfItem), [&](int64_t, int64_t) {
    for (int64_t row = next.fetch_add(kRowsOfItem); row < args.rows; row = next.fetch_add(kRowsOfItem)) {
      item<Dot>(args, row);
    }
  });
}

}  // namespace

void dense_linear(const DenseLinearArgs& args, bool& done, ParallelFor parallel) {
  done = args.tokens <= kMostTokens;
  if (!done) return;
  with_packed(args.dtype,
              [&](auto packed) { run<typename LanesOf<typename decltype(packed)::Storage>::Dot>(args, parallel); });
}
#else
void dense_linear(const DenseLinearArgs&, bool& done, ParallelFor) { done = false; }
#endif

}  // namespace patch_kernels::cpu::PK_ISA
