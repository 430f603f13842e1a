// Rate of streaming packed weights from HBM by bulk copies of one slot (16384 B dense half, 18432 B sparse tile),
// for 2..10 slots in flight on each SM, in one CTA or two, with and without the evict-first hint.
#include "common.cuh"

namespace {
using namespace micro;

constexpr size_t kSourceBytes = size_t{2} << 30;  // far above L2

// CTA c copies slots c, c + grid, ... of the source and keeps `depth` of them in flight.
__global__ __launch_bounds__(32, 2) void stream(const uint8_t* source, int slots, int slot_bytes, int depth,
                                                bool evict_first) {
  extern __shared__ uint8_t raw[];
  uint8_t* smem = align1024(raw);
  const uint32_t ring = smem_address(smem);
  const uint32_t barriers = ring + depth * slot_bytes;
  if (threadIdx.x != 0) return;
  for (int i = 0; i < depth; ++i) barrier_init(barriers + 8 * i, 1);
  barrier_init_fence();
  const uint64_t policy = evict_first_policy();
  int slot = 0, round = 0;
  const auto advance = [&] {
    if (++slot == depth) slot = 0, ++round;
  };
  for (int i = blockIdx.x; i < slots; i += gridDim.x) {
    if (round > 0) wait_parity(barriers + 8 * slot, (round - 1) & 1);
    const uint8_t* from = source + static_cast<size_t>(i) * slot_bytes;
    arrive_expect_tx(barriers + 8 * slot, slot_bytes);
    if (evict_first) {
      bulk_copy_hint(ring + slot * slot_bytes, from, slot_bytes, barriers + 8 * slot, policy);
    } else {
      bulk_copy(ring + slot * slot_bytes, from, slot_bytes, barriers + 8 * slot);
    }
    advance();
  }
  for (int i = 0; i < depth; ++i) {
    if (round > 0) wait_parity(barriers + 8 * slot, (round - 1) & 1);
    advance();
  }
}
}  // namespace

int main() {
  const int sms = require_hopper().multiProcessorCount;
  const uint8_t* source = random_array(kSourceBytes);
  for (const bool evict_first : {false, true}) {
    for (const int slot_bytes : {16384, 18432}) {
      for (const int ctas_per_sm : {1, 2}) {
        for (const int in_flight : {2, 4, 6, 8, 10}) {
          const int depth = in_flight / ctas_per_sm;
          const int slots = static_cast<int>(kSourceBytes / slot_bytes);
          // One CTA an SM: ask for more than half of its shared memory.
          const int smem = std::max(kAlignSlack + depth * (slot_bytes + 8), ctas_per_sm == 1 ? 120 << 10 : 0);
          const double ms = best_ms(5, [&] {
            launch(stream, ctas_per_sm * sms, 32, smem, 1, source, slots, slot_bytes, depth, evict_first);
          });
          emit("hbm_stream",
               std::to_string(slot_bytes) + " B, " + std::to_string(in_flight) + " in flight, " +
                   std::to_string(ctas_per_sm) + " CTA/SM" + (evict_first ? ", evict first" : ""),
               static_cast<double>(slots) * slot_bytes / ms * 1e-9, "TB/s");
        }
      }
    }
  }
}
