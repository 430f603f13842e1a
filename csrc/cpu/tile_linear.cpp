// y = x @ weight.T + bias on the CPU from packed tiles, with sums in fp32. Compiled once per instruction set (PK_ISA
// names the namespace); the kernels are in few_tokens.h, pairs.h and columns.h.
#include "tile_linear.h"

#include <atomic>
#include <deque>
#include <optional>

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
struct FewOf {
  using Kernel = FewTokens<typename LanesOf<T>::Lanes, T>;
};
#else
template <class T>
struct FewOf {
  using Kernel = void;
};
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
constexpr bool kHasFew = !std::is_void_v<typename FewOf<T>::Kernel>;

// All items of some matrices: the tile rows of each cut into pieces of so many rows, its tokens into pieces of so many.
class Items {
 public:
  void add(const Matrix& matrix, int rows, int tokens) {
    const int64_t pieces = ceil_div(matrix.rows, rows);
    count_ += pieces * ceil_div(matrix.x->count, tokens);
    cuts_.push_back({&matrix, rows, tokens, pieces, count_});
  }

  int64_t count() const { return count_; }

  Item at(int64_t index) const {
    auto cut = cuts_.begin();
    int64_t first = 0;
    for (; index >= cut->end; ++cut) first = cut->end;
    index -= first;
    const int64_t token = index / cut->pieces * cut->tokens, left = cut->matrix->x->count - token;
    const int64_t row = index % cut->pieces * cut->rows;
    return {cut->matrix, row / kTile, static_cast<int>(row % kTile),
            cut->rows,   token,       static_cast<int>(left < cut->tokens ? left : cut->tokens)};
  }

 private:
  struct Cut {
    const Matrix* matrix;
    int rows, tokens;  // of an item
    int64_t pieces;    // of its tile rows
    int64_t end;       // items of all matrices up to this one
  };
  std::vector<Cut> cuts_;
  int64_t count_ = 0;
};

// Items that keep all threads busy, if there are as many.
constexpr int64_t wanted_items(int threads) { return threads > 1 ? kItemsOfThread * threads : 1; }

// Threads take the next item when they are done with one: a busy core then costs its share and no more.
class Queue {
 public:
  explicit Queue(const Items& items) : items_(items) {}

  bool take(Item& item) {
    const int64_t index = next_.fetch_add(1);
    if (index >= items_.count()) return false;
    item = items_.at(index);
    return true;
  }

 private:
  const Items& items_;
  std::atomic<int64_t> next_{0};
};

template <class T>
void run_few(const TileLinearArgs* calls, int count, ParallelFor parallel) {
  std::vector<Tokens> x;
  std::vector<Matrix> matrices;
  x.reserve(count);
  matrices.reserve(count);
  for (int i = 0; i < count; ++i) {
    if (calls[i].tokens == 0) continue;
    x.emplace_back(calls[i]);
    matrices.emplace_back(calls[i], x.back());
  }
  // As many rows as caches like, halved down to a block while threads would be idle.
  for (int most_rows = kTile;; most_rows /= 2) {
    Items items;
    for (const Matrix& matrix : matrices) {
      const int tokens = static_cast<int>(matrix.x->count < kFewTokensAtOnce ? matrix.x->count : kFewTokensAtOnce);
      const int rows = few_tokens_rows(tokens);
      items.add(matrix, rows < most_rows ? rows : most_rows, tokens);
    }
    if (most_rows > kBlockRows && items.count() < wanted_items(calls[0].threads)) continue;
    Queue queue(items);
    return parallel_over(parallel, items.count(), [&](int64_t, int64_t) {
      Item item, upcoming;
      for (bool more = queue.take(item); more; item = upcoming) {
        more = queue.take(upcoming);
        FewOf<T>::Kernel::run(item, more ? &upcoming : nullptr);
      }
    });
  }
}

// The call for tokens [token, token + tokens).
inline TileLinearArgs tokens_of(TileLinearArgs call, int64_t token, int64_t tokens) {
  call.tokens = tokens;
  if (call.x_rows) {
    call.x_rows += token;
  } else {
    call.x = static_cast<const uint16_t*>(call.x) + token * call.weight.cols;
  }
  if (call.y_rows) {
    call.y_rows += token;
  } else {
    call.y = static_cast<uint16_t*>(call.y) + token * (call.y_stride ? call.y_stride : call.weight.rows);
  }
  return call;
}

// Tokens, in the order of a kernel too, and the weights times them.
template <class Many>
struct Share {
  Tokens x;
  std::vector<Matrix> matrices;
  std::optional<Many> kernel;

  explicit Share(const TileLinearArgs& args) : x(args) {}
};

// Items of at most so many rows and tokens, halved down to the least while threads would be idle.
template <class Many>
Items items_of_many(const std::deque<Share<Many>>& shares, int threads) {
  int rows = kTile, tokens = Many::kTokensOfItem;
  int64_t most_tokens = 0;
  for (const Share<Many>& share : shares) most_tokens = share.x.count > most_tokens ? share.x.count : most_tokens;
  for (;;) {
    Items items;
    for (const Share<Many>& share : shares) {
      for (const Matrix& matrix : share.matrices) items.add(matrix, rows, tokens);
    }
    if (items.count() >= wanted_items(threads)) return items;
    if (tokens > Many::kLeastTokens && most_tokens > tokens / 2) {
      tokens /= 2;
    } else if (rows > Many::kLeastRows) {
      rows /= 2;
    } else {
      return items;
    }
  }
}

template <class Many>
void multiply(std::deque<Share<Many>>& shares, int threads, ParallelFor parallel) {
  if (shares.size() == 1) {
    shares[0].kernel.emplace(shares[0].x, parallel);
  } else {
    parallel_over(parallel, static_cast<int64_t>(shares.size()), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) shares[i].kernel.emplace(shares[i].x, serial);
    });
  }
  const Items items = items_of_many(shares, threads);
  Queue queue(items);
  parallel_over(parallel, items.count(), [&](int64_t, int64_t) {
    auto share = shares.begin();  // of the worker; items come in the order of the shares
    std::optional<typename Many::Worker> worker;
    for (Item item; queue.take(item);) {
      if (!worker || item.matrix->x != &share->x) {
        while (item.matrix->x != &share->x) ++share;
        worker.emplace(*share->kernel);
      }
      worker->run(item);
    }
  });
}

constexpr int64_t kScratchBytes = 4 << 20;  // for x in the order of a kernel

// Tokens that fit the scratch share parallel regions, those of several calls too.
template <class T>
void run_many(const TileLinearArgs* calls, int count, ParallelFor parallel) {
  using Many = typename ManyOf<T>::Kernel;
  constexpr int64_t kBlock = Many::kTokensOfItem;
  int64_t at_once = kScratchBytes / (Many::kScratchOfValue * calls[0].weight.cols);
  at_once = at_once > kBlock ? at_once / kBlock * kBlock : at_once < 64 ? 64 : at_once / 64 * 64;
  std::deque<Share<Many>> shares;
  int64_t in_shares = 0;
  const auto multiply_shares = [&] {
    if (!shares.empty()) multiply(shares, calls[0].threads, parallel);
    shares.clear();
    in_shares = 0;
  };
  for (const TileLinearArgs *first = calls, *last, *end = calls + count; first < end; first = last) {
    for (last = first; last < end; ++last) {
      if (last->x != first->x || last->x_rows != first->x_rows || last->tokens != first->tokens) break;
    }
    for (int64_t token = 0, tokens; token < first->tokens; token += tokens) {
      tokens = first->tokens - token < at_once ? first->tokens - token : at_once;
      if (in_shares + tokens > at_once) multiply_shares();
      shares.emplace_back(tokens_of(*first, token, tokens));
      for (const TileLinearArgs* call = first; call < last; ++call) {
        shares.back().matrices.emplace_back(tokens_of(*call, token, tokens), shares.back().x);
      }
      in_shares += tokens;
    }
  }
  multiply_shares();
}

template <class T>
void run(const TileLinearArgs* calls, int count, bool few, ParallelFor parallel) {
  if constexpr (kHasFew<T>) {
    if (few) return run_few<T>(calls, count, parallel);
  }
  run_many<T>(calls, count, parallel);
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
  if (count == 0) return;
  with_packed(calls[0].dtype, [&](auto packed) {
    run<typename decltype(packed)::Storage>(calls, count, kernel == CpuKernel::kFew, parallel);
  });
}

}  // namespace patch_kernels::cpu::PK_ISA
