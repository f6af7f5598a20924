// The router's scores of many tokens in float32. See README.md.
#include "common/common.cuh"
#include "moe/params.h"

// Many tokens: 64 tokens by 64 experts by a part of the depth a block, 4 by 4 a thread, float32 throughout. The parts are added by
// the selection, so that a few tokens too occupy the device.
template <class T>
__device__ __forceinline__ void router_tile(const MoeRouterParams& p) {
  constexpr int kTile = 64, kDepth = 32;
  __shared__ alignas(16) float a[kDepth][kTile + 4];
  __shared__ alignas(16) float b[kDepth][kTile + 4];
  const uint32_t first_expert = blockIdx.x * kTile, first_token = blockIdx.y * kTile;
  const uint32_t span = (p.hidden + p.parts - 1) / p.parts;
  const uint32_t begin = blockIdx.z * span, end = min(begin + span, p.hidden);
  const uint32_t tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const uint32_t load_row = threadIdx.x / 4, load_depth = threadIdx.x % 4 * 4;
  const bool wide = p.hidden % 4 == 0 && span % 4 == 0;
  const bool has_token = first_token + load_row < p.tokens, has_expert = first_expert + load_row < p.experts;
  const T* x = static_cast<const T*>(p.x) + static_cast<uint64_t>(first_token + load_row) * p.hidden;
  const float* weight = p.weight + static_cast<uint64_t>(first_expert + load_row) * p.hidden;
  Quad next_a[2], next_b[2];
  auto read = [&](auto row, bool valid, uint32_t at) {
    Quad q = {};
    if (!valid) return q;
    if (wide) {
      if (at < end) q = read4(row + at);
    } else {
#pragma unroll
      for (int e = 0; e < 4; e++) q.x[e] = at + e < end ? widen(row[at + e]) : 0.0f;
    }
    return q;
  };
  auto read_weights = [&](uint32_t base) {
#pragma unroll
    for (int i = 0; i < 2; i++) next_b[i] = read(weight, has_expert, base + load_depth + i * 16);
  };
  auto read_tokens = [&](uint32_t base) {
#pragma unroll
    for (int i = 0; i < 2; i++) next_a[i] = read(x, has_token, base + load_depth + i * 16);
  };
  read_weights(begin);
  grid_dependency();
  read_tokens(begin);
  float sum[4][4] = {};
  for (uint32_t base = begin; base < end; base += kDepth) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        a[load_depth + i * 16 + e][load_row] = next_a[i].x[e];
        b[load_depth + i * 16 + e][load_row] = next_b[i].x[e];
      }
    }
    __syncthreads();
    read_weights(base + kDepth);
    read_tokens(base + kDepth);
#pragma unroll
    for (int k = 0; k < kDepth; k++) {
      const Quad v = read4(&a[k][ty * 4]), w = read4(&b[k][tx * 4]);
#pragma unroll
      for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) sum[i][j] += v.x[i] * w.x[j];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t token = first_token + ty * 4 + i;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const uint32_t expert = first_expert + tx * 4 + j;
      if (token < p.tokens && expert < p.experts) {
        p.scores[(static_cast<uint64_t>(blockIdx.z) * p.tokens + token) * p.experts + expert] = sum[i][j];
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(256) moe_router_tile_fp32(const __grid_constant__ MoeRouterParams p) { router_tile<float>(p); }
extern "C" __global__ void __launch_bounds__(256) moe_router_tile_bf16(const __grid_constant__ MoeRouterParams p) { router_tile<bf16>(p); }
