// Do bulk copies into shared memory slow wgmma down? Two warpgroups run whole tiles (TileRow) on resident data
// while one thread streams from L2 into slots nobody reads, at a paced rate. It gives rho, the cost of a sparse tile
// over that of a dense one, with the writes that the real kernel makes: its weights and its share of x, for each token
// width BN.
#include "common.cuh"

namespace {
using namespace micro;

constexpr int kConsumers = 256;
constexpr int kThreads = kConsumers + 128;  // setmaxnreg works on warpgroups
constexpr int kTiles = 512;
constexpr int kChunk = 8192;
constexpr int kDepth = 16;
constexpr int kSourceBytes = 32 << 20;  // stays in L2

template <int kN>
constexpr int smem_bytes() {
  return kAlignSlack + 2 * kSparseTileBytes + 2 * kN * 128 + kDepth * (kChunk + 16);
}

struct Cycles {
  long long wgmmas, stream;
};

// `chunks` copies per CTA, the i-th not before cycle i * period of the CTA.
template <int kN, bool kSparse, int kCluster>
__global__ __launch_bounds__(kThreads, 1) void contention(const uint8_t* source, int chunks, float period,
                                                          Cycles* cycles, float* sink) {
  extern __shared__ uint8_t raw[];
  uint8_t* smem = align1024(raw);
  const int warpgroup = threadIdx.x / 128;
  uint8_t* weights = smem;  // 16384 B a warpgroup; the metadata lie after the slots that need 1024-byte bases
  uint8_t* x = weights + 2 * kSlotBytes;
  uint8_t* ring_slots = x + 2 * kN * 128;
  uint8_t* metadata = ring_slots + kDepth * kChunk;
  uint8_t* barriers = metadata + 2 * kMetaBytes;
  fill_values(weights, 2 * kSlotBytes + 2 * kN * 128, blockIdx.x);
  fill_metadata(metadata, 2 * kMetaBytes, blockIdx.x);
  async_proxy_fence();
  Ring<kCluster> ring{smem_address(ring_slots), smem_address(barriers), kChunk, kDepth};
  if (threadIdx.x == kConsumers) ring.init();
  __syncthreads();
  if constexpr (kCluster > 1) cluster_sync();

  if (warpgroup < 2) {
    set_registers<true, 232>();
    TileRow<kN> row;
    row.init(weights + warpgroup * kSlotBytes, x, metadata + warpgroup * kMetaBytes);
    uint32_t even[4], odd[4];
    named_barrier(1, kConsumers);
    const long long begin = clock64();
#pragma unroll 1
    for (int tile = 0; tile < kTiles; tile += 2) {
      if constexpr (kSparse) {
        row.sparse(even);
        row.sparse(odd);
      } else {
        row.dense();
        row.dense();
      }
    }
    wgmma_wait<0>();
    named_barrier(1, kConsumers);
    if (threadIdx.x == 0) cycles[blockIdx.x].wgmmas = clock64() - begin;
    sink[blockIdx.x * kConsumers + threadIdx.x] = total(row.low) + total(row.high);
  } else {
    set_registers<false, 40>();
    if (threadIdx.x == kConsumers) {
      const long long begin = clock64();
      // All CTAs sweep the whole source from places far apart; the CTAs of a cluster read the same bytes.
      size_t at = static_cast<size_t>(blockIdx.x / kCluster) * 16 * kChunk % kSourceBytes;
      for (int i = 0; i < chunks; ++i) {
        const long long due = begin + static_cast<long long>(i * period);
        while (clock64() < due) {
        }
        ring.fill(source + at);
        at = (at + kChunk) % kSourceBytes;
      }
    } else if (threadIdx.x == kConsumers + 32) {
      const long long begin = clock64();
      for (int i = 0; i < chunks; ++i) ring.retire();
      cycles[blockIdx.x].stream = clock64() - begin;
    }
    __syncwarp();  // the cluster barrier below is for whole warps
  }
  if constexpr (kCluster > 1) cluster_sync();  // a peer may still write here
}

struct Bench {
  int sms;
  const uint8_t* source;
  Cycles* cycles;
  float* sink;

  struct Result {
    double tile_cycles;  // of one tile of each warpgroup
    double rate;         // bytes written to shared memory in a cycle
  };

  // `rate` bytes per cycle asked for; the stream lasts a little longer than the wgmmas are expected to.
  template <int kN, bool kSparse, int kCluster>
  Result run(double rate, double expected_tile_cycles) const {
    const int ctas = sms / kCluster * kCluster;
    const int chunks = static_cast<int>(1.15 * rate * expected_tile_cycles * kTiles / kChunk);
    const float period = rate > 0 ? static_cast<float>(kChunk / rate) : 0.0f;
    launch(contention<kN, kSparse, kCluster>, ctas, kThreads, smem_bytes<kN>(), kCluster, source, chunks, period,
           cycles, sink);
    std::vector<double> wgmmas, stream;
    for (const Cycles& each : download(cycles, ctas)) {
      wgmmas.push_back(static_cast<double>(each.wgmmas));
      stream.push_back(static_cast<double>(each.stream));
    }
    return {median(wgmmas) / kTiles, chunks > 0 ? static_cast<double>(chunks) * kChunk / median(stream) : 0.0};
  }

  template <int kN, bool kSparse, int kCluster>
  double natural(const char* name, double alone) const {
    // Both warpgroups' weights and the x of one tile: what a CTA writes while each warpgroup does one tile.
    const double bytes = 2 * tile_bytes(kSparse) + 2 * kN * 128;
    Result result{alone, 0};
    for (int i = 0; i < 4; ++i) {  // the slower the tiles, the lower the rate they need: a fixed point
      result = run<kN, kSparse, kCluster>(bytes / result.tile_cycles, result.tile_cycles);
    }
    const std::string head =
        "BN " + std::to_string(kN) + " " + name + " own writes cluster " + std::to_string(kCluster);
    emit("contention", head, result.tile_cycles, "cycles/tile");
    // Below 1 the L2 link, not shared memory, bounds the writes, and the cycles above are too good.
    emit("contention", head + " supplied", result.rate * result.tile_cycles / bytes, "share");
    return result.tile_cycles;
  }

  template <int kN, bool kSparse>
  double sweep(const char* name) const {
    const std::string head = "BN " + std::to_string(kN) + " " + name;
    run<kN, kSparse, 1>(0, 1);
    const double alone = run<kN, kSparse, 1>(0, 1).tile_cycles;
    emit("contention", head + " no writes", alone, "cycles/tile");
    double at = alone;
    for (const int rate : {8, 16, 24, 32, 48, 64, 96}) {
      const Result result = run<kN, kSparse, 2>(rate, at);
      at = result.tile_cycles;
      char reached[32];
      std::snprintf(reached, sizeof(reached), "%.1f", result.rate);
      emit("contention", head + " writes asked " + std::to_string(rate) + " got " + reached + " B/cycle", at,
           "cycles/tile");
    }
    return alone;
  }

  template <int kN>
  void all() const {
    const std::string head = "BN " + std::to_string(kN) + " rho ";
    const double dense = sweep<kN, false>("dense"), sparse = sweep<kN, true>("sparse");
    emit("contention", head + "no writes", sparse / dense, "ratio");
    emit("contention", head + "own writes cluster 1",
         natural<kN, true, 1>("sparse", sparse) / natural<kN, false, 1>("dense", dense), "ratio");
    emit("contention", head + "own writes cluster 2",
         natural<kN, true, 2>("sparse", sparse) / natural<kN, false, 2>("dense", dense), "ratio");
  }
};
}  // namespace

int main() {
  const int sms = require_hopper().multiProcessorCount;
  const Bench bench{sms, random_array(kSourceBytes), device_array<Cycles>(sms), device_array<float>(kConsumers * sms)};
  bench.all<64>();
  bench.all<128>();
  bench.all<160>();
  bench.all<176>();
  bench.all<192>();
}
