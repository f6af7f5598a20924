// The products with the latent's weights for few tokens, bound by latency: keys absorbed into queries, with the latent store beside them,
// and values out of latent averages. Weights are in registers before the kernel ahead has ended. See README.md.
#include "common/mma.cuh"
#include "mla/store.cuh"

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Eight bfloat16 numbers in float32.
__device__ __forceinline__ void widen8(float (&to)[8], const uint4& from) {
  const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    to[2 * i] = __uint_as_float(words[i] << 16);
    to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

// A block has 128 channels of the latent for one (token, head), out [R] = q [n] . weight [n][R], n <= 128; the blocks behind the last
// head store the latent.
constexpr int kColumns = 128;
constexpr int kColumnThreads = kColumns / 8;              // eight channels each
constexpr int kRowGroups = kThreads / kColumnThreads;
constexpr int kGroupRows = 128 / kRowGroups;

extern "C" __global__ void __launch_bounds__(kThreads) mla_absorb_few_bf16(const __grid_constant__ MlaAbsorbParams both) {
  __shared__ float scratch[kWarp];
  __shared__ float sums[kWarps][kColumns];
  const MlaStoreParams& p = both.store;
  const uint32_t head = blockIdx.x, token = blockIdx.z;
  grid_trigger();
  if (head == p.heads) {
    grid_wait();
    if (blockIdx.y > 0 || p.places[token] == kNoPlace) return;
    store_latent<bf16>(p, token, scratch, [](const bf16* x, uint32_t at) { return widen(x[at]); });
    return;
  }
  const uint32_t column = blockIdx.y * kColumns + threadIdx.x % kColumnThreads * 8, group = threadIdx.x / kColumnThreads;
  const bf16* weight = static_cast<const bf16*>(both.weight) + static_cast<uint64_t>(head) * (p.nope + both.value) * p.latent + column;
  uint4 rows[kGroupRows];
#pragma unroll
  for (int i = 0; i < kGroupRows; i++) {
    const uint32_t n = group + i * kRowGroups;
    rows[i] = n < p.nope ? *reinterpret_cast<const uint4*>(weight + static_cast<uint64_t>(n) * p.latent) : make_uint4(0, 0, 0, 0);
  }
  grid_wait();
  const bf16* query = static_cast<const bf16*>(p.query_source) + static_cast<uint64_t>(token) * p.query_pitch + head * (p.nope + p.rope);
  float* out = p.queries + (static_cast<uint64_t>(token) * p.heads + head) * (p.latent + p.rope);
  float sum[8] = {};
#pragma unroll
  for (int i = 0; i < kGroupRows; i++) {
    const uint32_t n = group + i * kRowGroups;
    const float q = n < p.nope ? widen(query[n]) : 0.0f;
    float w[8];
    widen8(w, rows[i]);
#pragma unroll
    for (int e = 0; e < 8; e++) sum[e] += q * w[e];
  }
  // Two groups share a warp.
  static_assert(2 * kColumnThreads == kWarp, "lanes of two groups");
#pragma unroll
  for (int e = 0; e < 8; e++) sum[e] += __shfl_xor_sync(~0u, sum[e], kColumnThreads);
  if (threadIdx.x % kWarp < kColumnThreads) {
#pragma unroll
    for (int e = 0; e < 8; e++) sums[threadIdx.x / kWarp][threadIdx.x % kColumnThreads * 8 + e] = sum[e];
  }
  __syncthreads();
  if (threadIdx.x < kColumns) {
    float whole = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; w++) whole += sums[w][threadIdx.x];
    out[blockIdx.y * kColumns + threadIdx.x] = whole;
  } else if (blockIdx.y == 0) {
    // Channels that need no absorption.
    for (uint32_t i = threadIdx.x - kColumns; i < p.rope; i += kThreads - kColumns) out[p.latent + i] = widen(query[p.nope + i]);
  }
}

// A block has 32 of the values of one (token, head), four a warp: out [m] = weight [m][R] . latent [R], R <= 512.
constexpr int kWarpValues = 4;
constexpr int kPieces = 2;  // of eight numbers a lane

extern "C" __global__ void __launch_bounds__(kThreads) mla_values_few_bf16(const __grid_constant__ MlaValuesParams p) {
  const uint32_t lane = threadIdx.x % kWarp, head = blockIdx.x, token = blockIdx.z;
  const uint32_t first = (blockIdx.y * kWarps + threadIdx.x / kWarp) * kWarpValues;
  grid_trigger();
  const bf16* weight = static_cast<const bf16*>(p.weight) + (static_cast<uint64_t>(head) * (p.nope + p.value) + p.nope) * p.latent;
  uint4 rows[kWarpValues][kPieces];
#pragma unroll
  for (int v = 0; v < kWarpValues; v++) {
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      const uint32_t at = (lane + i * kWarp) * 8;
      const bool valid = at < p.latent && first + v < p.value;
      rows[v][i] = valid ? *reinterpret_cast<const uint4*>(weight + static_cast<uint64_t>(first + v) * p.latent + at) : make_uint4(0, 0, 0, 0);
    }
  }
  grid_wait();
  const float* latent = p.latents + (static_cast<uint64_t>(token) * p.heads + head) * p.latent;
  float sum[kWarpValues] = {};
#pragma unroll
  for (int i = 0; i < kPieces; i++) {
    const uint32_t at = (lane + i * kWarp) * 8;
    if (at >= p.latent) continue;
    float x[8];
#pragma unroll
    for (int e = 0; e < 8; e += 4) {
      const Quad q = read4(latent + at + e);
#pragma unroll
      for (int k = 0; k < 4; k++) x[e + k] = rounded<bf16>(q.x[k]);
    }
#pragma unroll
    for (int v = 0; v < kWarpValues; v++) {
      float w[8];
      widen8(w, rows[v][i]);
#pragma unroll
      for (int e = 0; e < 8; e++) sum[v] += w[e] * x[e];
    }
  }
#pragma unroll
  for (int v = 0; v < kWarpValues; v++) {
    sum[v] = warp_sum(sum[v]);
    if (lane == 0 && first + v < p.value) {
      static_cast<bf16*>(p.out)[(static_cast<uint64_t>(token) * p.heads + head) * p.value + first + v] = narrow<bf16>(sum[v]);
    }
  }
}
