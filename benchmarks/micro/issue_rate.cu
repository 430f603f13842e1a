// SM cycles of one wgmma, dense (m64nNk16) and sparse (m64nNk32), A in shared memory (ss) or registers (rs).
// The arithmetic alone takes N/2 cycles in both; what is above it is shared-memory bandwidth (docs/inside/gemm.md).
#include "common.cuh"

namespace {
using namespace micro;

constexpr int kWgmmas = 4;  // of one loop round
constexpr int kRounds = 2048;

enum class Kind { kDense, kSparse };

template <int kN, Kind kKind, bool kRegisters>
__global__ __launch_bounds__(256, 1) void issue_rate(long long* cycles, float* sink) {
  extern __shared__ uint8_t raw[];
  uint8_t* smem = align1024(raw);
  constexpr int kSlot = 128 * 128;  // a 64-row slot of A for each warpgroup
  uint8_t* x = smem + kSlot;        // two slots of kN tokens x 64 columns
  fill_values(smem, kSlot + 2 * kN * 128, blockIdx.x);
  async_proxy_fence();
  __syncthreads();

  const uint64_t a = descriptor(smem_address(smem) + threadIdx.x / 128 * 8192);
  const uint64_t b = descriptor(smem_address(x));
  const uint32_t metadata = random_metadata(threadIdx.x);
  uint32_t fragment[4];
  for (int i = 0; i < 4; ++i) fragment[i] = random_bf16x2(4 * threadIdx.x + i);
  float d[kN / 2];
  zero(d);

  __syncthreads();
  const long long begin = clock64();
#pragma unroll 2
  for (int round = 0; round < kRounds; ++round) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kWgmmas; ++step) {
      if constexpr (kKind == Kind::kDense) {
        const uint64_t x_step = b + step * kStep16;
        if constexpr (kRegisters) {
          Wgmma<kN>::dense_rs(d, fragment, x_step);
        } else {
          Wgmma<kN>::dense_ss(d, a + step * kStep16, x_step);
        }
      } else {
        const uint64_t x_step = b + step / 2 * (kN * 128 / 16) + step % 2 * kStep32;
        if constexpr (kRegisters) {
          Wgmma<kN>::template sparse_rs<0>(d, fragment, x_step, metadata);
        } else {
          Wgmma<kN>::template sparse_ss<0>(d, a + step * kStep16, x_step, metadata);
        }
      }
    }
    wgmma_commit();
    wgmma_wait<1>();
  }
  wgmma_wait<0>();
  __syncthreads();
  const long long end = clock64();
  if (threadIdx.x == 0) cycles[blockIdx.x] = end - begin;
  sink[blockIdx.x * blockDim.x + threadIdx.x] = total(d);
}

struct Run {
  int sms;
  long long* cycles;
  float* sink;

  template <int kN, Kind kKind, bool kRegisters>
  void one(const char* name) const {
    for (int warpgroups = 1; warpgroups <= 2; ++warpgroups) {
      const int smem = kAlignSlack + 128 * 128 + 2 * kN * 128;
      for (int i = 0; i < 2; ++i) {  // the first launch warms up
        launch(issue_rate<kN, kKind, kRegisters>, sms, 128 * warpgroups, smem, 1, cycles, sink);
      }
      // Two warpgroups share the tensor cores: cycles of the SM per instruction of either.
      const double each = median_cycles(cycles, sms) / (static_cast<double>(kRounds) * kWgmmas * warpgroups);
      emit("issue_rate", std::string(name) + " n" + std::to_string(kN) + " " + std::to_string(warpgroups) + "wg", each,
           "cycles");
    }
  }
  template <int kN>
  void all() const {
    one<kN, Kind::kDense, false>("dense ss");
    one<kN, Kind::kDense, true>("dense rs");
    one<kN, Kind::kSparse, false>("sparse ss");
    one<kN, Kind::kSparse, true>("sparse rs");
  }
};
}  // namespace

int main() {
  const int sms = require_hopper().multiProcessorCount;
  const Run run{sms, device_array<long long>(sms), device_array<float>(256 * sms)};
  run.all<8>();
  run.all<16>();
  run.all<32>();
  run.all<64>();
  run.all<128>();
  run.all<160>();
  run.all<176>();
  run.all<192>();
  run.all<256>();
}
