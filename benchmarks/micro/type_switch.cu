// What a change between dense and sparse tiles costs. Two warpgroups run 64 tiles whose types are bits of a word,
// with and without the drain (wgmma.wait_group 0) that the ordering rules ask for between wgmmas of different shapes.
#include "common.cuh"

namespace {
using namespace micro;

constexpr int kConsumers = 256;
constexpr int kRounds = 16;  // sweeps over the 64 tiles

template <int kN>
constexpr int smem_bytes() {
  return kAlignSlack + 2 * kSparseTileBytes + 2 * kN * 128;
}

// Bit i of `types`: tile i is sparse. Run-time data, as in the real kernel.
template <int kN, bool kDrain>
__global__ __launch_bounds__(kConsumers, 1) void type_switch(uint64_t types, long long* cycles, float* sink) {
  extern __shared__ uint8_t raw[];
  uint8_t* smem = align1024(raw);
  const int warpgroup = threadIdx.x / 128;
  uint8_t* x = smem + 2 * kSlotBytes;
  uint8_t* metadata = x + 2 * kN * 128;
  fill_values(smem, 2 * kSlotBytes + 2 * kN * 128, blockIdx.x);
  fill_metadata(metadata, 2 * kMetaBytes, blockIdx.x);
  async_proxy_fence();
  TileRow<kN> row;
  row.init(smem + warpgroup * kSlotBytes, x, metadata + warpgroup * kMetaBytes);
  uint32_t even[4], odd[4];
  __syncthreads();
  const long long begin = clock64();
  bool before = types & 1;
#pragma unroll 1
  for (int tile = 0; tile < 64 * kRounds; tile += 2) {
    const bool first = types >> (tile & 63) & 1, second = types >> (tile + 1 & 63) & 1;
    if (kDrain && first != before) wgmma_wait<0>();
    if (first) {
      row.sparse(even);
    } else {
      row.dense();
    }
    if (kDrain && second != first) wgmma_wait<0>();
    if (second) {
      row.sparse(odd);
    } else {
      row.dense();
    }
    before = second;
  }
  wgmma_wait<0>();
  __syncthreads();
  if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - begin;
  sink[blockIdx.x * kConsumers + threadIdx.x] = total(row.low) + total(row.high);
}

struct Bench {
  int sms;
  long long* cycles;
  float* sink;

  template <int kN, bool kDrain>
  double run(uint64_t types) const {
    for (int i = 0; i < 2; ++i) {  // the first launch warms up
      launch(type_switch<kN, kDrain>, sms, kConsumers, smem_bytes<kN>(), 1, types, cycles, sink);
    }
    return median_cycles(cycles, sms) / (64 * kRounds);
  }

  template <int kN, bool kDrain>
  void all(const char* how) const {
    const std::string head = "BN " + std::to_string(kN) + " " + how + " ";
    const double dense = run<kN, kDrain>(0), sparse = run<kN, kDrain>(~0ull);
    const double alternating = run<kN, kDrain>(0xAAAAAAAAAAAAAAAA), runs = run<kN, kDrain>(0xFF00FF00FF00FF00);
    emit("type_switch", head + "dense", dense, "cycles/tile");
    emit("type_switch", head + "sparse", sparse, "cycles/tile");
    emit("type_switch", head + "runs of 8", runs, "cycles/tile");
    emit("type_switch", head + "alternating", alternating, "cycles/tile");
    const double apart = (dense + sparse) / 2;
    emit("type_switch", head + "cost of a switch, runs of 8", 8 * (runs - apart), "cycles");
    emit("type_switch", head + "cost of a switch, alternating", alternating - apart, "cycles");
  }
};
}  // namespace

int main() {
  const int sms = require_hopper().multiProcessorCount;
  const Bench bench{sms, device_array<long long>(sms), device_array<float>(kConsumers * sms)};
  bench.all<128, true>("drained");
  bench.all<128, false>("not drained");
  bench.all<192, true>("drained");
  bench.all<192, false>("not drained");
}
