// The second halves of the low-rank gates for steps of some dozen tokens: [tokens][2][128] by [2][P][128] weights to [tokens][2][P] float32.
// The library's product does the same, but nothing begins before it has ended; here `kda_decode_bulk` asks for its first states
// meanwhile. 64 tokens by 64 channels a block. See README.md.
#include "common/mma.cuh"
#include "kda/params.h"

constexpr int kTile = 64;
constexpr int kDepth = 128;
constexpr int kPitch = kDepth + 8;
constexpr int kThreads = 128;  // four warps, 32 tokens by 32 channels each

// 64 rows of 128 numbers; rows that there are not are zeros.
__device__ __forceinline__ void fetch(bf16 (*to)[kPitch], const bf16* from, uint64_t pitch, uint32_t rows) {
#pragma unroll
  for (int i = 0; i < kTile * kDepth / 8 / kThreads; i++) {
    const uint32_t at = threadIdx.x + i * kThreads, row = at / (kDepth / 8), column = at % (kDepth / 8) * 8;
    const bool valid = row < rows;
    copy_async(&to[row][column], from + (valid ? row * pitch : 0) + column, valid);
  }
  copy_commit();
}

extern "C" __global__ void __launch_bounds__(kThreads) kda_gates(const __grid_constant__ KdaGatesParams p) {
  __shared__ alignas(16) bf16 tokens[kTile][kPitch];
  __shared__ alignas(16) bf16 weights[kTile][kPitch];
  const uint32_t first_channel = blockIdx.x * kTile, first_token = blockIdx.y * kTile;  // of 2 P
  const uint32_t which = first_channel >= p.channels;
  grid_trigger();
  // Nothing writes weights.
  fetch(weights, static_cast<const bf16*>(p.weight) + static_cast<uint64_t>(first_channel) * kDepth, kDepth, kTile);
  grid_wait();
  const bf16* in = static_cast<const bf16*>(p.in) + static_cast<uint64_t>(first_token) * p.in_pitch + which * kDepth;
  fetch(tokens, in, p.in_pitch, min(p.tokens - first_token, static_cast<uint32_t>(kTile)));
  copy_wait<0>();
  __syncthreads();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row = warp / 2 * 32, column = warp % 2 * 32;
  Accumulator sum[2][4] = {};
#pragma unroll 2
  for (int base = 0; base < kDepth; base += 16) {
    FragmentA a[2];
    FragmentB b[4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      a[i] = load_a(&tokens[row + i * 16][base], kPitch, lane);
      FragmentB pair[2];
      load_b_pair_transposed(pair, &weights[column + i * 16][base], kPitch, lane);
      b[i * 2] = pair[0];
      b[i * 2 + 1] = pair[1];
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int j = 0; j < 4; j++) mma(sum[i][j], a[i], b[j]);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t token = first_token + row + i * 16 + lane / 4 + half * 8;
      if (token >= p.tokens) continue;
      float* to = p.out + static_cast<uint64_t>(token) * 2 * p.channels + first_channel + column + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < 4; j++) *reinterpret_cast<float2*>(to + j * 8) = {sum[i][j].x[half * 2], sum[i][j].x[half * 2 + 1]};
    }
  }
}
