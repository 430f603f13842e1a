// Checks cpu::tile_linear, with the kernels for few and for many tokens, and cpu::dense_linear without torch, on random
// problems until the time is over:
//   exact       integers, against the plain triple loop of integer_problem.h; several weights in one call
//   rows        the same, when every weight has tokens of its own, any rows of x that go to any rows of y
//   same bits   real x: from run to run, over any number of threads, and with batch_invariant for any number of tokens
//   pruned      NaN in the columns that no row keeps does not reach y
// Everything that the kernels are given lies against an inaccessible page, so that one byte beyond it ends the run.
//   PATCH_KERNELS_CPU_ISA=avx2 cpu_driver --seconds 2 --seed 1
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <thread>

#include "../cpu/isa.h"
#include "integer_problem.h"

namespace patch_kernels::cpu {
// dispatch.cpp points to every op; only the linear ones are linked.
#define PK_ABSENT(isa)                                                                                          \
  namespace isa {                                                                                               \
  void masked_weight(const MaskedWeightArgs&, void*, double*, ParallelFor) { std::abort(); }                    \
  void masked_weight_backward(const MaskedWeightArgs&, const MaskedWeightGrads&, ParallelFor) { std::abort(); } \
  void adamw_step(const AdamWArgs&, ParallelFor) { std::abort(); }                                              \
  }
PK_ISAS(PK_ABSENT)
}  // namespace patch_kernels::cpu

namespace patch_kernels {
namespace {

int threads = 1;  // of parallel_for, which has no other way to be told

void parallel_for(int64_t n, ParallelBody body, void* context) {
  const int64_t parts = std::min<int64_t>(n, threads);
  std::vector<std::thread> workers;
  for (int64_t i = 1; i < parts; ++i) {
    workers.emplace_back([=] { body(n * i / parts, n * (i + 1) / parts, context); });
  }
  body(0, n / parts, context);
  for (std::thread& worker : workers) worker.join();
}

// n values that begin right after an inaccessible page or end right before one.
template <class T>
class Fenced {
 public:
  Fenced(size_t n, bool at_end) : size(n) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t inside = (n * sizeof(T) + page - 1) / page * page;
    bytes_ = inside + 2 * page;
    void* mapped = mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) std::abort();
    pages_ = static_cast<uint8_t*>(mapped);
    if (inside > 0 && mprotect(pages_ + page, inside, PROT_READ | PROT_WRITE) != 0) std::abort();
    data = reinterpret_cast<T*>(pages_ + page + (at_end ? inside - n * sizeof(T) : 0));
  }
  Fenced(Fenced&& other) noexcept : size(other.size), data(other.data), pages_(other.pages_), bytes_(other.bytes_) {
    other.pages_ = nullptr;
  }
  Fenced(const T* from, size_t n, bool at_end) : Fenced(n, at_end) { std::copy(from, from + n, data); }
  ~Fenced() {
    if (pages_) munmap(pages_, bytes_);
  }

  size_t size;
  T* data;

 private:
  uint8_t* pages_;
  size_t bytes_;
};

// Some tile rows of a problem as a weight of its own.
struct Part {
  int first, rows;
  Fenced<uint8_t> payload, flags;
  Fenced<uint16_t> bias;
};

template <class Problem>
std::vector<Part> cut(const Problem& problem, int count, std::mt19937& random) {
  std::vector<Part> parts;
  const auto end = [&] { return between(random, 0, 1) != 0; };
  int tile_row = 0;
  const uint8_t* payload = problem.payload->data;
  for (int i = 0; i < count; ++i) {
    const int left = problem.tile_rows - tile_row, others = count - 1 - i;
    const int taken = others == 0 ? left : between(random, 1, left - others);
    const uint8_t* flags = problem.is_sparse.data() + tile_row * problem.tile_cols;
    const int tiles = taken * problem.tile_cols, first = tile_row * kTile;
    const int rows = std::min(taken * kTile, problem.sizes.rows - first);
    const int64_t bytes = cpu::payload_bytes(flags, tiles);
    parts.push_back({first, rows, Fenced<uint8_t>(payload, bytes, end()), Fenced<uint8_t>(flags, tiles, end()),
                     Fenced<uint16_t>(problem.bias.data() + first, rows, end())});
    payload += bytes;
    tile_row += taken;
  }
  return parts;
}

struct Options {
  DType dtype;
  int cols;
  bool has_bias, batch_invariant;
  CpuKernel kernel;
  int threads;
  bool y_at_end;
};

// y of all parts, (tokens, sum of rows).
std::vector<uint16_t> multiply(const std::vector<Part>& parts, const Fenced<uint16_t>& x, int tokens,
                               const Options& options) {
  std::vector<TileLinearArgs> calls;
  std::vector<Fenced<uint16_t>> outputs;
  int rows = 0;
  for (const Part& part : parts) {
    outputs.emplace_back(static_cast<size_t>(tokens) * part.rows, options.y_at_end);
    std::fill(outputs.back().data, outputs.back().data + outputs.back().size, uint16_t{0x7FFF});
    TileLinearArgs call{x.data,
                        options.has_bias ? part.bias.data : nullptr,
                        outputs.back().data,
                        tokens,
                        {part.payload.data, part.flags.data, part.rows, options.cols},
                        options.dtype,
                        options.batch_invariant,
                        options.threads};
    calls.push_back(call);
    rows += part.rows;
  }
  threads = options.threads;
  cpu::tile_linear(calls.data(), static_cast<int>(calls.size()),
                   options.batch_invariant ? CpuKernel::kFew : options.kernel, parallel_for);
  std::vector<uint16_t> y(static_cast<size_t>(tokens) * rows);
  for (size_t i = 0; i < parts.size(); ++i) {
    for (int t = 0; t < tokens; ++t) {
      const uint16_t* from = outputs[i].data + static_cast<size_t>(t) * parts[i].rows;
      std::copy(from, from + parts[i].rows, y.begin() + static_cast<int64_t>(t) * rows + parts[i].first);
    }
  }
  return y;
}

// Every part times random rows of x, all in one call, into rows of its y in random order and with a gap behind each;
// expected: y of all rows.
std::string check_rows(std::mt19937& random, const std::vector<Part>& parts, const Fenced<uint16_t>& x, int tokens,
                       const Options& options, const std::vector<uint16_t>& expected) {
  constexpr uint16_t kUntouched = 0x7FFF;
  const size_t all_rows = tokens == 0 ? 0 : expected.size() / tokens;
  std::vector<std::vector<int64_t>> x_rows, y_rows;
  std::vector<TileLinearArgs> calls;
  std::vector<Fenced<uint16_t>> outputs;
  for (const Part& part : parts) {
    const int count = tokens == 0 ? 0 : between(random, 0, tokens + 3);
    const int64_t stride = part.rows + between(random, 0, 9);
    x_rows.emplace_back(count);
    y_rows.emplace_back(count);
    for (int t = 0; t < count; ++t) {
      x_rows.back()[t] = between(random, 0, tokens - 1);
      y_rows.back()[t] = t;
    }
    std::shuffle(y_rows.back().begin(), y_rows.back().end(), random);
    outputs.emplace_back(static_cast<size_t>(count * stride), options.y_at_end);
    std::fill(outputs.back().data, outputs.back().data + outputs.back().size, kUntouched);
    calls.push_back({x.data,
                     options.has_bias ? part.bias.data : nullptr,
                     outputs.back().data,
                     count,
                     {part.payload.data, part.flags.data, part.rows, options.cols},
                     options.dtype,
                     options.batch_invariant,
                     options.threads,
                     x_rows.back().data(),
                     y_rows.back().data(),
                     stride});
  }
  threads = options.threads;
  cpu::tile_linear(calls.data(), static_cast<int>(calls.size()), options.kernel, parallel_for);
  for (size_t i = 0; i < parts.size(); ++i) {
    const int64_t stride = calls[i].y_stride;
    for (int64_t t = 0; t < calls[i].tokens; ++t) {
      const uint16_t *y = outputs[i].data + y_rows[i][t] * stride,
                     *right = expected.data() + x_rows[i][t] * all_rows + parts[i].first;
      if (!std::equal(y, y + parts[i].rows, right)) return "rows: token " + std::to_string(t) + " is wrong";
      if (std::any_of(y + parts[i].rows, y + stride, [](uint16_t value) { return value != kUntouched; })) {
        return "rows: written behind a row of y";
      }
    }
  }
  return "";
}

constexpr int kThreads[] = {1, 2, 3, 5};

CpuKernel random_kernel(std::mt19937& random) {
  return between(random, 0, 1) != 0 ? CpuKernel::kFew : CpuKernel::kMany;
}

// A finite number of any of some orders of magnitude, so that sums depend on their order.
template <class Element>
uint16_t random_real(std::mt19937& random) {
  return Element::round(static_cast<float>(between(random, -999, 999)) /
                        static_cast<float>(1 << between(random, 0, 9)));
}

template <class Packed>
std::string check_random(std::mt19937& random, const Sizes& sizes) {
  using Numbers = Element<Packed>;
  IntegerProblem<Numbers> problem(sizes);
  const int count = between(random, 1, std::min(3, problem.tile_rows));
  const std::vector<Part> parts = cut(problem, count, random);
  const size_t cols = sizes.cols;
  Fenced<uint16_t> x(sizes.tokens * cols, between(random, 0, 1) != 0);
  for (int t = 0; t < sizes.tokens; ++t) {
    const uint16_t* from = problem.x.data + static_cast<size_t>(t) * problem.x_stride();
    std::copy(from, from + cols, x.data + t * cols);
  }
  Options options{Packed::kDType,
                  sizes.cols,
                  sizes.bias,
                  between(random, 0, 1) != 0,
                  random_kernel(random),
                  kThreads[between(random, 0, 3)],
                  between(random, 0, 1) != 0};
  std::vector<uint16_t> y = multiply(parts, x, sizes.tokens, options);
  std::copy(y.begin(), y.end(), problem.y.data + problem.kCanaries);
  std::string complaint = problem.complaint();
  if (complaint.empty()) complaint = check_rows(random, parts, x, sizes.tokens, options, y);
  if (!complaint.empty()) return complaint;

  for (size_t i = 0; i < x.size; ++i) x.data[i] = random_real<Numbers>(random);
  y = multiply(parts, x, sizes.tokens, options);
  for (const int other : kThreads) {
    options.threads = other;
    if (multiply(parts, x, sizes.tokens, options) != y) return "other bits with " + std::to_string(other) + " threads";
  }
  options.batch_invariant = true;
  y = multiply(parts, x, sizes.tokens, options);
  const int fewer[] = {1, between(random, 1, 8), between(random, 1, 200)};
  for (const int tokens : fewer) {
    if (tokens > sizes.tokens) continue;
    const Fenced<uint16_t> first(x.data, tokens * cols, between(random, 0, 1) != 0);
    const std::vector<uint16_t> alone = multiply(parts, first, tokens, options);
    if (!std::equal(alone.begin(), alone.end(), y.begin())) {
      return "batch_invariant: other bits with " + std::to_string(tokens) + " tokens";
    }
  }
  return "";
}

// Every group keeps the same two columns and x is NaN in the others.
template <class Packed>
std::string check_pruned(std::mt19937& random, const Sizes& sizes) {
  using Numbers = Element<Packed>;
  const int cols = sizes.cols / kGroup * kGroup + kGroup, tokens = std::max(1, sizes.tokens);
  const int first = between(random, 0, 2), second = between(random, first + 1, 3);
  const size_t count = static_cast<size_t>(sizes.rows) * cols;
  std::vector<uint16_t> weight(count);
  std::unique_ptr<bool[]> keep(new bool[count]);
  std::vector<int> sums(sizes.rows);
  for (size_t i = 0; i < count; ++i) {
    const int column = static_cast<int>(i % cols), value = between(random, -7, 7);
    keep[i] = column % kGroup == first || column % kGroup == second;
    weight[i] = Numbers::round(static_cast<float>(value));
    if (keep[i]) sums[i / cols] += value;
  }
  const int64_t tiles = ceil_div(sizes.rows, kTile) * ceil_div(cols, kTile);
  const std::vector<uint8_t> is_sparse(tiles, 1);
  Part part{0, sizes.rows, Fenced<uint8_t>(cpu::payload_bytes(is_sparse.data(), tiles), true),
            Fenced<uint8_t>(is_sparse.data(), tiles, true), Fenced<uint16_t>(0, true)};
  cpu::pack_tiles(weight.data(), keep.get(), is_sparse.data(), sizes.rows, cols, part.payload.data, parallel_for);
  Fenced<uint16_t> x(static_cast<size_t>(tokens) * cols, true);
  for (size_t i = 0; i < x.size; ++i) x.data[i] = keep[i % cols] ? Numbers::round(1.0f) : uint16_t{0x7FFF};
  std::vector<Part> parts;
  parts.push_back(std::move(part));
  const Options options{Packed::kDType, cols, false, between(random, 0, 1) != 0, random_kernel(random), 2, true};
  const std::vector<uint16_t> y = multiply(parts, x, tokens, options);
  for (size_t i = 0; i < y.size(); ++i) {
    const auto sum = static_cast<float>(round_integer(sums[i % sizes.rows], Packed::kPrecision));
    if (y[i] != Numbers::round(sum)) return "NaN of pruned columns: y[" + std::to_string(i) + "] is wrong";
  }
  return "";
}

// dense_linear on integers, where this instruction set has a kernel for it.
template <class Packed>
std::string check_dense(std::mt19937& random, const Sizes& sizes) {
  using Numbers = Element<Packed>;
  const int tokens = sizes.tokens % 12;
  const size_t rows = sizes.rows, cols = sizes.cols;
  const auto end = [&] { return between(random, 0, 1) != 0; };
  Fenced<uint16_t> x(tokens * cols, end()), weight(rows * cols, end()), bias(rows, end()), y(tokens * rows, end());
  for (const Fenced<uint16_t>* numbers : {&x, &weight, &bias}) {
    for (size_t i = 0; i < numbers->size; ++i) {
      numbers->data[i] = Numbers::round(static_cast<float>(between(random, -3, 3)));
    }
  }
  threads = kThreads[between(random, 0, 3)];
  bool done = false;
  cpu::dense_linear(
      {x.data, weight.data, sizes.bias ? bias.data : nullptr, y.data, tokens, sizes.rows, sizes.cols, Packed::kDType},
      done, parallel_for);
  for (size_t i = 0; done && i < y.size; ++i) {
    const uint16_t *of_x = x.data + i / rows * cols, *of_weight = weight.data + i % rows * cols;
    float sum = sizes.bias ? Numbers::widen(bias.data[i % rows]) : 0.0f;
    for (size_t k = 0; k < cols; ++k) sum += Numbers::widen(of_x[k]) * Numbers::widen(of_weight[k]);
    if (y.data[i] != Numbers::round(sum)) return "dense_linear: y[" + std::to_string(i) + "] is wrong";
  }
  return "";
}

char current[256];  // the problem, for a fault

void fault(int) {
  const char text[] = "access beyond the data of: ";
  if (write(STDERR_FILENO, text, sizeof(text) - 1) < 0 || write(STDERR_FILENO, current, strlen(current)) < 0) _exit(3);
  _exit(2);
}

int run(double seconds, uint32_t seed) {
  std::mt19937 random(seed);
  const auto start = std::chrono::steady_clock::now();
  int passed = 0;
  do {
    const Sizes sizes = random_sizes(random, 420, 700, between(random, 0, 3) == 0 ? 200 : 20);
    for_each_packed([&](auto packed) {
      using Packed = decltype(packed);
      snprintf(current, sizeof(current), "%s %s\n", Packed::kShortName, describe(sizes).c_str());
      for (const auto check : {check_random<Packed>, check_pruned<Packed>, check_dense<Packed>}) {
        const std::string complaint = check(random, sizes);
        if (complaint.empty()) {
          ++passed;
        } else {
          printf("%s: %s", complaint.c_str(), current);
          std::exit(1);
        }
      }
    });
  } while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds);
  printf("%s: %d passed, 0 failed\n", cpu::instruction_set(), passed);
  return 0;
}

}  // namespace
}  // namespace patch_kernels

int main(int argc, char** argv) {
  double seconds = 1;
  uint32_t seed = 1;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::string(argv[i]) == "--seconds") seconds = std::atof(argv[i + 1]);
    if (std::string(argv[i]) == "--seed") seed = static_cast<uint32_t>(std::atoll(argv[i + 1]));
  }
  std::signal(SIGSEGV, patch_kernels::fault);
  std::signal(SIGBUS, patch_kernels::fault);
  return patch_kernels::run(seconds, seed);
}
