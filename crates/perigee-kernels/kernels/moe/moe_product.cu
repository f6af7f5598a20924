// Grouped products in float32 arithmetic for any depth and width: 64 rows by 64 columns a block, 4 by 4 a thread. The float32
// mode, and the fallback of the tensor-core kernels.
#include "common/common.cuh"
#include "moe/params.h"

constexpr int kTile = 64;
constexpr int kDepth = 16;

// Weight row of output channel c: blocks of 8 gate rows are followed by the 8 up rows of the same channels.
__device__ __forceinline__ uint64_t gate_row(uint32_t c) { return static_cast<uint64_t>(c) / 8 * 16 + c % 8; }

template <class T, bool kGated>
__device__ __forceinline__ void product(const MoeProductParams& p) {
  __shared__ float a[kDepth][kTile + 4];
  __shared__ float b[kDepth][kTile + 4];
  __shared__ float b_up[kGated ? kDepth : 1][kTile + 4];
  if (blockIdx.y >= *p.tile_count) return;
  const MoeTile tile = p.tiles[blockIdx.y];
  const uint32_t first_column = blockIdx.x * kTile;
  const uint64_t weight_rows = kGated ? 2ull * p.width : p.width;
  const T* weight = static_cast<const T*>(p.weight) + tile.expert * weight_rows * p.depth;
  const T* in = static_cast<const T*>(p.in);
  const uint32_t tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float sum[4][4] = {}, sum_up[4][4] = {};
  // Thread's share of a load: four rows, one depth.
  const uint32_t load_depth = threadIdx.x % kDepth, load_row = threadIdx.x / kDepth;
  for (uint32_t base = 0; base < p.depth; base += kDepth) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t row = load_row + 16 * i;
      const uint32_t column = first_column + row;
      const uint32_t at = base + load_depth;
      float x = 0.0f, w = 0.0f, w_up = 0.0f;
      if (at < p.depth) {
        if (row < tile.rows) {
          const uint64_t from = kGated ? p.source[tile.first + row] / p.top_k : tile.first + row;
          x = widen(in[from * p.depth + at]);
        }
        if (column < p.width) {
          w = widen(weight[(kGated ? gate_row(column) : column) * p.depth + at]);
          if (kGated) w_up = widen(weight[(gate_row(column) + 8) * p.depth + at]);
        }
      }
      a[load_depth][row] = x;
      b[load_depth][row] = w;
      if (kGated) b_up[load_depth][row] = w_up;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; k++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          sum[i][j] += a[k][ty * 4 + i] * b[k][tx * 4 + j];
          if (kGated) sum_up[i][j] += a[k][ty * 4 + i] * b_up[k][tx * 4 + j];
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t row = ty * 4 + i;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const uint32_t column = first_column + tx * 4 + j;
      if (row < tile.rows && column < p.width) {
        const float value = kGated ? silu(sum[i][j]) * sum_up[i][j] : sum[i][j];
        static_cast<T*>(p.out)[static_cast<uint64_t>(tile.first + row) * p.width + column] = narrow<T>(value);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(256) moe_gate_up_fp32(const __grid_constant__ MoeProductParams p) { product<float, true>(p); }
extern "C" __global__ void __launch_bounds__(256) moe_gate_up_bf16(const __grid_constant__ MoeProductParams p) { product<bf16, true>(p); }
extern "C" __global__ void __launch_bounds__(256) moe_down_fp32(const __grid_constant__ MoeProductParams p) { product<float, false>(p); }
extern "C" __global__ void __launch_bounds__(256) moe_down_bf16(const __grid_constant__ MoeProductParams p) { product<bf16, false>(p); }
