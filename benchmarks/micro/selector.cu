// Does wgmma.sp read the metadata as packed format v1 stores it, selector 1 included?
//   m64n8k32, m64n64k32  every (64-row block, k32 step) of one packed tile, bitwise against the host
//   overwritten          the metadata register changes while the wgmmas that read it are in flight
// Values are small integers, so every summation order gives the same fp32.
#include <cstring>

#include "common.cuh"

namespace {
using namespace micro;

constexpr int kRepeats = 64;      // wgmmas of "overwritten"
constexpr int kOverwriteN = 128;  // long enough that the next metadata is written long before a wgmma has ended

struct Case {
  std::vector<uint8_t> tile;  // a sparse tile, format v1
  std::vector<uint8_t> x;     // two slots of tokens x 64 columns, swizzled
  int tokens;
};

void put_bf16(std::vector<uint8_t>& bytes, int offset, int value) {
  const float real = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &real, 4);
  bytes[offset] = (bits >> 16) & 255;
  bytes[offset + 1] = bits >> 24;
}
int get_bf16(const std::vector<uint8_t>& bytes, int offset) {
  const uint32_t bits = static_cast<uint32_t>(bytes[offset]) << 16 | static_cast<uint32_t>(bytes[offset + 1]) << 24;
  float real;
  std::memcpy(&real, &bits, 4);
  return static_cast<int>(real);
}
int x_offset(int tokens, int token, int k) { return k / 64 * tokens * 128 + swizzle128(token, 2 * (k % 64)); }

uint32_t metadata_word(const Case& data, int word) {
  uint32_t bits;
  std::memcpy(&bits, data.tile.data() + kSlotBytes + 4 * word, 4);
  return bits;
}

Case random_case(int tokens, uint32_t seed) {
  Case data{std::vector<uint8_t>(kSparseTileBytes), std::vector<uint8_t>(2 * tokens * 128), tokens};
  for (int row = 0; row < kTile; ++row) {
    for (int p = 0; p < kKeptPerRow; ++p) {
      put_bf16(data.tile, value_offset(row, p), static_cast<int>(mix(seed + row * kKeptPerRow + p) % 15) - 7);
    }
  }
  for (int word = 0; word < kMetaBytes / 4; ++word) {
    const uint32_t bits = random_metadata(seed + 77777 + word);
    std::memcpy(data.tile.data() + kSlotBytes + 4 * word, &bits, 4);
  }
  for (int token = 0; token < tokens; ++token) {
    for (int k = 0; k < kTile; ++k) {
      put_bf16(data.x, x_offset(tokens, token, k), static_cast<int>(mix(seed + 99999 + token * kTile + k) % 9) - 4);
    }
  }
  return data;
}

// Product of one k32 step of a 64-row block. `pair` says which lanes of a quad the metadata comes from: the step's own
// selector is what format v1 means, the other one is a diagnosis. `flip` is XORed into every metadata word.
std::vector<float> expected(const Case& data, int block, int step, int pair, uint32_t flip = 0) {
  std::vector<float> y(64 * data.tokens);
  for (int r = 0; r < 64; ++r) {
    const int row = 64 * block + r;
    for (int token = 0; token < data.tokens; ++token) {
      int sum = 0;
      for (int g = 0; g < 8; ++g) {
        const int group = 8 * step + g;
        const int home = meta_word(row, group);  // lane bit 1, word bit 2, is the selector
        const uint32_t word = metadata_word(data, (home & ~4) | pair << 2) ^ flip;
        const uint32_t nibble = word >> meta_shift(row, group) & 15;
        for (int i = 0; i < 2; ++i) {
          const int k = 4 * group + (nibble >> (2 * i) & 3);
          sum +=
              get_bf16(data.tile, value_offset(row, 2 * group + i)) * get_bf16(data.x, x_offset(data.tokens, token, k));
        }
      }
      y[r * data.tokens + token] = static_cast<float>(sum);
    }
  }
  return y;
}

__device__ void load(uint8_t* smem, const uint8_t* tile, const uint8_t* x, int x_bytes) {
  for (int i = threadIdx.x; i < kSlotBytes; i += blockDim.x) smem[i] = tile[i];
  for (int i = threadIdx.x; i < x_bytes; i += blockDim.x) smem[kSlotBytes + i] = x[i];
  async_proxy_fence();
  __syncthreads();
}

// Accumulator i of thread t is row 16*(t/32) + (t%32)/4 + 8*(i/2%2), token 2*(t%4) + i%2 + 8*(i/4).
template <int kN>
__device__ void store(float* y, const float (&d)[kN / 2]) {
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) {
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * (i / 2 % 2);
    y[row * kN + 2 * (threadIdx.x % 4) + i % 2 + 8 * (i / 4)] = d[i];
  }
}

// The eight bytes of metadata that format v1 keeps for thread t and a 64-row block: [half of the tile's columns].
__device__ const uint32_t* thread_metadata(const uint8_t* tile, int block) {
  return reinterpret_cast<const uint32_t*>(tile + kSlotBytes + 1024 * block + 8 * threadIdx.x);
}

template <int kN, int kSelector>
__global__ void one_step(const uint8_t* tile, const uint8_t* x, int block, int half, float* y) {
  extern __shared__ uint8_t raw[];
  uint8_t* smem = align1024(raw);
  load(smem, tile, x, 2 * kN * 128);
  const uint64_t a = descriptor(smem_address(smem)) + block * kRows64 + (2 * half + kSelector) * kStep16;
  const uint64_t b = descriptor(smem_address(smem + kSlotBytes)) + half * (kN * 128 / 16) + kSelector * kStep32;
  const uint32_t metadata = thread_metadata(tile, block)[half];
  float d[kN / 2];
  zero(d);
  wgmma_fence();
  Wgmma<kN>::template sparse_ss<kSelector>(d, a, b, metadata);
  wgmma_commit();
  wgmma_wait<0>();
  store<kN>(y, d);
}

// Every second wgmma keeps the other columns. Its metadata is loaded into the register of the one before, which is
// still in flight. (Arithmetic on that register would not test it: ptxas then serializes, C7513.)
__global__ void overwritten(const uint8_t* tile, const uint8_t* x, uint32_t flip, float* y) {
  extern __shared__ uint8_t raw[];
  uint8_t* smem = align1024(raw);
  __shared__ uint32_t words[2][128];
  words[0][threadIdx.x] = thread_metadata(tile, 0)[0];
  words[1][threadIdx.x] = words[0][threadIdx.x] ^ flip;
  load(smem, tile, x, 2 * kOverwriteN * 128);
  const uint64_t a = descriptor(smem_address(smem));
  const uint64_t b = descriptor(smem_address(smem + kSlotBytes));
  uint32_t from = smem_address(&words[0][threadIdx.x]);
  float d[kOverwriteN / 2];
  zero(d);
#pragma unroll 1
  for (int i = 0; i < kRepeats; ++i) {
    uint32_t metadata;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(metadata) : "r"(from));
    from ^= smem_address(&words[0][threadIdx.x]) ^ smem_address(&words[1][threadIdx.x]);
    wgmma_fence();
    Wgmma<kOverwriteN>::sparse_ss<0>(d, a, b, metadata);
    wgmma_commit();
    wgmma_wait<1>();
  }
  wgmma_wait<0>();
  store<kOverwriteN>(y, d);
}

// No single XOR maps all six legal nibbles to legal ones, so this case uses two of them alone: columns 0,1 and columns
// 2,3.
constexpr uint32_t kNibble = 0x4, kOtherNibble = 0xE;
constexpr uint32_t kFlip = (kNibble ^ kOtherNibble) * 0x11111111u;

int mismatches(const std::vector<float>& got, const std::vector<float>& want) {
  int count = 0;
  for (size_t i = 0; i < want.size(); ++i) count += std::memcmp(&got[i], &want[i], 4) != 0;
  return count;
}

struct OnDevice {
  uint8_t *tile, *x;
  explicit OnDevice(const Case& data)
      : tile(device_array<uint8_t>(data.tile.size())), x(device_array<uint8_t>(data.x.size())) {
    CUDA_CHECK(cudaMemcpy(tile, data.tile.data(), data.tile.size(), cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(x, data.x.data(), data.x.size(), cudaMemcpyHostToDevice));
  }
};

template <int kN, int kSelector>
void check_selector(const std::string& shape) {
  int wrong = 0, other_pair = 0;
  float* y = device_array<float>(64 * kN);
  for (uint32_t seed = 1; seed <= 4; ++seed) {
    const Case data = random_case(kN, 1000003 * seed);
    const OnDevice device(data);
    for (int block = 0; block < 2; ++block) {
      for (int half = 0; half < 2; ++half) {
        CUDA_CHECK(cudaMemset(y, 0xFF, 64 * kN * 4));  // NaN
        launch(one_step<kN, kSelector>, 1, 128, kAlignSlack + kSlotBytes + 2 * kN * 128, 1, device.tile, device.x,
               block, half, y);
        const std::vector<float> got = download(y, 64 * kN);
        const int step = 2 * half + kSelector;
        wrong += mismatches(got, expected(data, block, step, kSelector));
        other_pair += mismatches(got, expected(data, block, step, 1 - kSelector));
      }
    }
    CUDA_CHECK(cudaFree(device.tile));
    CUDA_CHECK(cudaFree(device.x));
  }
  const std::string name = shape + " selector " + std::to_string(kSelector);
  emit("selector", name, wrong, "mismatches");
  emit("selector", name + " against the other lane pair", other_pair, "mismatches");
  CUDA_CHECK(cudaFree(y));
}

void check_overwrite() {
  Case data = random_case(kOverwriteN, 5);
  const uint32_t word = kNibble * 0x11111111u;
  for (int i = 0; i < kMetaBytes / 4; ++i) std::memcpy(data.tile.data() + kSlotBytes + 4 * i, &word, 4);
  const OnDevice device(data);
  float* y = device_array<float>(64 * kOverwriteN);
  launch(overwritten, 1, 128, kAlignSlack + kSlotBytes + 2 * kOverwriteN * 128, 1, device.tile, device.x, kFlip, y);
  const std::vector<float> even = expected(data, 0, 0, 0), odd = expected(data, 0, 0, 0, kFlip);
  std::vector<float> want(even.size());
  for (size_t i = 0; i < want.size(); ++i) want[i] = kRepeats / 2 * (even[i] + odd[i]);
  emit("selector", "overwritten in flight", mismatches(download(y, want.size()), want), "mismatches");
}
}  // namespace

int main() {
  require_hopper();
  check_selector<8, 0>("m64n8k32");
  check_selector<8, 1>("m64n8k32");
  check_selector<64, 0>("m64n64k32");
  check_selector<64, 1>("m64n64k32");
  check_overwrite();
}
