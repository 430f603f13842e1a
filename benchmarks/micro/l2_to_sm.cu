// How fast bulk copies bring L2-resident data into shared memory of all SMs at once, without multicast and with
// multicast to clusters of 2 and 4 CTAs, which halves and quarters what crosses the link from L2.
#include "common.cuh"

namespace {
using namespace micro;

constexpr int kSourceBytes = 16 << 20;
constexpr int kSlot = 16384;
constexpr int kSlots = 2048;  // that each CTA receives

template <int kCluster>
__global__ __launch_bounds__(64, 1) void receive(const uint8_t* source, int depth, long long* cycles) {
  extern __shared__ uint8_t raw[];
  uint8_t* smem = align1024(raw);
  Ring<kCluster> ring{smem_address(smem), smem_address(smem + depth * kSlot), kSlot, depth};
  if (threadIdx.x == 0) ring.init();
  __syncthreads();
  if constexpr (kCluster > 1) cluster_sync();
  if (threadIdx.x == 0) {
    // Every cluster sweeps the whole source, each from its own place.
    size_t at = static_cast<size_t>(blockIdx.x / kCluster) * 7 * kSlot % kSourceBytes;
    for (int i = 0; i < kSlots; ++i) {
      ring.fill(source + at);
      at = (at + kSlot) % kSourceBytes;
    }
  } else if (threadIdx.x == 32) {
    const long long begin = clock64();
    for (int i = 0; i < kSlots; ++i) ring.retire();
    cycles[blockIdx.x] = clock64() - begin;
  }
  __syncwarp();
  if constexpr (kCluster > 1) cluster_sync();
}

template <int kCluster>
void all(int sms, const uint8_t* source, long long* cycles) {
  for (const int depth : {4, 8, 12}) {
    const int smem = kAlignSlack + depth * (kSlot + 16);
    const int ctas = sms / kCluster * kCluster;
    const double ms = best_ms(5, [&] { launch(receive<kCluster>, ctas, 64, smem, kCluster, source, depth, cycles); });
    const std::string name = "multicast " + std::to_string(kCluster) + ", " + std::to_string(depth) + " slots ";
    const double received = static_cast<double>(kSlots) * kSlot;
    const double rate = received / median_cycles(cycles, ctas);
    emit("l2_to_sm", name + "received", rate, "B/cycle/SM");
    emit("l2_to_sm", name + "from L2", rate / kCluster, "B/cycle/SM");
    emit("l2_to_sm", name + "from L2, all SMs", received / kCluster * ctas / ms * 1e-9, "TB/s");
  }
}
}  // namespace

int main() {
  const int sms = require_hopper().multiProcessorCount;
  const uint8_t* source = random_array(kSourceBytes);
  long long* cycles = device_array<long long>(sms);
  all<1>(sms, source, cycles);
  all<2>(sms, source, cycles);
  all<4>(sms, source, cycles);
}
