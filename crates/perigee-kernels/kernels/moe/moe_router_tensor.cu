// The router's scores of many tokens on tensor cores, where its weights are stored in bfloat16: products of two bfloat16 numbers are
// exact in float32, which they are summed in. 64 tokens by 64 experts by a part of the depth a block; the selection adds the parts.
// See README.md.
#include "common/mma.cuh"
#include "moe/params.h"

constexpr int kTile = 64;
constexpr int kDepth = 64;         // of a stage
constexpr int kPitch = kDepth + 8;
constexpr int kStages = 4;
constexpr int kThreads = 128;      // four warps, 32 tokens by 32 experts each

struct Shared {
  bf16 tokens[kStages][kTile][kPitch];
  bf16 experts[kStages][kTile][kPitch];
};

// 64 rows of 64 numbers; rows that there are not are zeros.
__device__ __forceinline__ void fetch(bf16 (*to)[kPitch], const void* matrix, uint32_t first, uint32_t rows, uint32_t depth, uint32_t base) {
#pragma unroll
  for (int i = 0; i < kTile * kDepth / 8 / kThreads; i++) {
    const uint32_t at = threadIdx.x + i * kThreads, row = at / (kDepth / 8), channel = at % (kDepth / 8) * 8;
    const bool valid = first + row < rows;
    const bf16* from = static_cast<const bf16*>(matrix) + static_cast<uint64_t>(valid ? first + row : 0) * depth + base + channel;
    copy_async(&to[row][channel], from, valid);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads) moe_router_tensor(const __grid_constant__ MoeRouterParams p) {
  extern __shared__ uint4 dynamic[];
  Shared& s = *reinterpret_cast<Shared*>(dynamic);
  const uint32_t first_expert = blockIdx.x * kTile, first_token = blockIdx.y * kTile;
  const uint32_t steps = p.hidden / kDepth, share = (steps + p.parts - 1) / p.parts;
  const uint32_t begin = min(blockIdx.z * share, steps), end = min(begin + share, steps);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row = warp / 2 * 32, column = warp % 2 * 32;
  auto fetch_weights = [&](uint32_t step) {
    if (step < end) fetch(s.experts[step % kStages], p.weight, first_expert, p.experts, p.hidden, step * kDepth);
  };
  auto fetch_tokens = [&](uint32_t step) {
    if (step < end) fetch(s.tokens[step % kStages], p.x, first_token, p.tokens, p.hidden, step * kDepth);
    copy_commit();
  };
  // Nothing writes weights.
#pragma unroll
  for (int ahead = 0; ahead < kStages - 1; ahead++) fetch_weights(begin + ahead);
  grid_dependency();
#pragma unroll
  for (int ahead = 0; ahead < kStages - 1; ahead++) fetch_tokens(begin + ahead);
  Accumulator sum[2][4] = {};
  for (uint32_t step = begin; step < end; step++) {
    copy_wait<kStages - 2>();
    // Also: every warp is done with the stage that is filled next.
    __syncthreads();
    fetch_weights(step + kStages - 1);
    fetch_tokens(step + kStages - 1);
    const bf16(*tokens)[kPitch] = s.tokens[step % kStages];
    const bf16(*experts)[kPitch] = s.experts[step % kStages];
#pragma unroll
    for (int base = 0; base < kDepth; base += 16) {
      FragmentA a[2];
      FragmentB b[4];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        a[i] = load_a(&tokens[row + i * 16][base], kPitch, lane);
        FragmentB pair[2];
        load_b_pair_transposed(pair, &experts[column + i * 16][base], kPitch, lane);
        b[i * 2] = pair[0];
        b[i * 2 + 1] = pair[1];
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) mma(sum[i][j], a[i], b[j]);
      }
    }
  }
  float* scores = p.scores + static_cast<uint64_t>(blockIdx.z) * p.tokens * p.experts;
#pragma unroll
  for (int i = 0; i < 2; i++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const uint32_t token = first_token + row + i * 16 + lane / 4 + e / 2 * 8;
      if (token >= p.tokens) continue;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const uint32_t expert = first_expert + column + j * 8 + lane % 4 * 2 + e % 2;
        if (expert < p.experts) scores[static_cast<uint64_t>(token) * p.experts + expert] = sum[i][j].x[e];
      }
    }
  }
}

// Size of the dynamic shared memory, as the launcher computes it.
static_assert(sizeof(Shared) == 4 * 2 * 64 * 72 * 2, "launcher's size");
