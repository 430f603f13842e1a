// y = x @ weight.T + bias on the CPU from packed tiles, with sums in fp32. Compiled once per instruction set (PK_ISA
// names the namespace); the kernels are in few_tokens.h, pairs.h and columns.h.
#include "tile_linear.h"

#include <atomic>

#include "columns.h"
#include "costs.h"
#include "few_tokens.h"
#include "isa.h"

#if defined(__AVX512BW__)
#include "lanes_avx512.h"
#elif defined(__AVX2__)
#include "lanes_avx2.h"
#elif defined(PK_NEON)
#include "lanes_neon.h"
#endif
#if defined(PK_AMX)
#include "amx.h"
#elif defined(__AVX512BF16__)
#include "pairs.h"
#endif

namespace patch_kernels::cpu::PK_ISA {
namespace {

// The kernels of a packed dtype: for a few tokens (void: none) and for many.
#if defined(__AVX512BW__) || defined(__AVX2__) || defined(PK_NEON)
template <class T>
using Few = FewTokens<typename LanesOf<T>::Lanes, T>;
#else
template <class T>
using Few = void;
#endif

template <class T>
struct ManyOf {
  using Kernel = Columns<T>;
};
#if defined(__AVX512BF16__)
template <>
struct ManyOf<BFloat16> {
#if defined(PK_AMX)
  using Kernel = AmxOrPairs;
#else
  using Kernel = Pairs;
#endif
};
#endif

constexpr int64_t kItemsOfThread = 8;

template <class T>
constexpr bool kHasFew = !std::is_void_v<Few<T>>;

// All items of the matrices: their tile rows cut into pieces of rows_of_item, the tokens into pieces of tokens_of_item.
class Items {
 public:
  Items(const std::vector<Matrix>& matrices, int64_t tokens, int rows_of_item, int tokens_of_item)
      : matrices_(&matrices), tokens_(tokens), rows_(rows_of_item), tokens_of_item_(tokens_of_item) {
    for (const Matrix& matrix : matrices) pieces_ += pieces(matrix);
  }

  int64_t count() const { return pieces_ * ceil_div(tokens_, tokens_of_item_); }

  Item at(int64_t index) const {
    const int64_t token = index / pieces_ * tokens_of_item_, left = tokens_ - token;
    int64_t piece = index % pieces_;
    const Matrix* matrix = matrices_->data();
    for (; piece >= pieces(*matrix); ++matrix) piece -= pieces(*matrix);
    const int64_t row = piece * rows_;
    return {matrix, row / kTile, static_cast<int>(row % kTile),
            rows_,  token,       static_cast<int>(left < tokens_of_item_ ? left : tokens_of_item_)};
  }

 private:
  int64_t pieces(const Matrix& matrix) const { return ceil_div(matrix.rows, rows_); }

  const std::vector<Matrix>* matrices_;
  int64_t tokens_, pieces_ = 0;
  int rows_, tokens_of_item_;
};

// Items of at most so many rows and tokens, halved down to the least while threads would be idle.
Items items_for(const std::vector<Matrix>& matrices, int64_t tokens, int threads, int rows, int least_rows,
                int tokens_of_item, int least_tokens) {
  const int64_t wanted = threads > 1 ? kItemsOfThread * threads : 1;
  for (;;) {
    const Items items(matrices, tokens, rows, tokens_of_item);
    if (items.count() >= wanted) return items;
    if (tokens_of_item > least_tokens && tokens > tokens_of_item / 2) {
      tokens_of_item /= 2;
    } else if (rows > least_rows) {
      rows /= 2;
    } else {
      return items;
    }
  }
}

// Threads take the next item when they are done with one: a busy core then costs its share and no more.
template <class Kernel>
void run(const Kernel& kernel, const Items& items, ParallelFor parallel) {
  std::atomic<int64_t> next{0};
  const int64_t count = items.count();
  parallel_over(parallel, count, [&](int64_t, int64_t) {
    typename Kernel::Worker worker(kernel);
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) worker.run(items.at(i));
  });
}

template <class T>
void run_few(const std::vector<Matrix>& matrices, const Tokens& x, int threads, ParallelFor parallel) {
  const int tokens = static_cast<int>(x.count < kFewTokensAtOnce ? x.count : kFewTokensAtOnce);
  const Items items =
      items_for(matrices, x.count, threads, few_tokens_rows(tokens), kBlockRows, tokens, kFewTokensAtOnce);
  run(Few<T>(x, parallel), items, parallel);
}

template <class T>
void run_many(const std::vector<Matrix>& matrices, const Tokens& x, int threads, ParallelFor parallel) {
  using Many = typename ManyOf<T>::Kernel;
  const Items items =
      items_for(matrices, x.count, threads, kTile, Many::kLeastRows, Many::kTokensOfItem, Many::kLeastTokens);
  run(Many(x, parallel), items, parallel);
}

constexpr int64_t kScratchBytes = 4 << 20;  // for x in the order of a kernel

template <class T>
void run(const TileLinearArgs* calls, int count, bool few, ParallelFor parallel) {
  using Many = typename ManyOf<T>::Kernel;
  const TileLinearArgs& first = calls[0];
  const int64_t cols = first.weight.cols;
  constexpr int64_t kBlock = Many::kTokensOfItem;
  int64_t at_once = first.tokens;
  if (!few) {
    at_once = kScratchBytes / (Many::kScratchOfValue * cols);
    at_once = at_once > kBlock ? at_once / kBlock * kBlock : at_once < 64 ? 64 : at_once / 64 * 64;
  }
  for (int64_t token = 0; token < first.tokens; token += at_once) {
    const int64_t tokens = first.tokens - token < at_once ? first.tokens - token : at_once;
    std::vector<Matrix> matrices;
    matrices.reserve(count);
    for (int i = 0; i < count; ++i) {
      TileLinearArgs part = calls[i];
      part.y = static_cast<T*>(part.y) + token * part.weight.rows;
      matrices.emplace_back(part);
    }
    const Tokens x(static_cast<const T*>(first.x) + token * cols, tokens, cols);
    if constexpr (kHasFew<T>) {
      if (few) {
        run_few<T>(matrices, x, first.threads, parallel);
        continue;
      }
    }
    run_many<T>(matrices, x, first.threads, parallel);
  }
}

float time(const TileCost& cost, CpuKernel kernel, int64_t tokens) {
  switch (kernel) {
    case CpuKernel::kFew:
      return cost.few + cost.few_token * static_cast<float>(tokens);
    case CpuKernel::kMany:
      return cost.many + cost.many_16 * static_cast<float>(ceil_div(tokens, 16));
    default:
      return cost.torch + cost.torch_token * static_cast<float>(tokens);
  }
}

template <class T>
CpuKernel cheapest(const TileLinearArgs& call) {
  if (!kHasFew<T>) return CpuKernel::kMany;
  if (call.batch_invariant || call.tokens <= kTokensInRegisters) return CpuKernel::kFew;
  const int64_t tiles = ceil_div(call.weight.rows, kTile) * ceil_div(call.weight.cols, kTile);
  const int64_t sparse = count_sparse(call.weight.tile_is_sparse, tiles);
  constexpr Costs costs = CostsOf<T>::kCosts;
  CpuKernel best = CpuKernel::kFew;
  float least = kNever;
  for (const CpuKernel kernel : {CpuKernel::kFew, CpuKernel::kMany, CpuKernel::kTorch}) {
    const float of_all = static_cast<float>(tiles - sparse) * time(costs.dense, kernel, call.tokens) +
                         static_cast<float>(sparse) * time(costs.sparse, kernel, call.tokens);
    if (kernel == CpuKernel::kFew || of_all < least) {
      best = kernel;
      least = of_all;
    }
  }
  return best;
}

}  // namespace

void choose_kernel(const TileLinearArgs& call, CpuKernel& kernel) {
  with_packed(call.dtype, [&](auto packed) { kernel = cheapest<typename decltype(packed)::Storage>(call); });
}

// Where a dtype has no kernel for few tokens, the one for many takes all.
void tile_linear(const TileLinearArgs* calls, int count, CpuKernel kernel, ParallelFor parallel) {
  if (count == 0 || calls[0].tokens == 0) return;
  with_packed(calls[0].dtype, [&](auto packed) {
    run<typename decltype(packed)::Storage>(calls, count, kernel == CpuKernel::kFew, parallel);
  });
}

}  // namespace patch_kernels::cpu::PK_ISA
