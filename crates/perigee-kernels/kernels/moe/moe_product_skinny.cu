// Grouped products for experts of few rows each, bound by reading the experts' weights: up to 32 rows of one expert by 64 or 128
// weight rows a block, by gemm/skinny.cuh. See README.md.
#include "gemm/skinny.cuh"
#include "moe/params.h"

template <int kTokens, int kRowWarps>
using Form = Skinny<kTokens, kRowWarps, 2, kTokens == 32 ? 3 : 4>;

template <int kTokens, int kRowWarps, bool kGated>
__device__ __forceinline__ void product(const MoeProductParams& p, const MoeTile& tile) {
  extern __shared__ uint4 dynamic[];
  __shared__ uint32_t rows[kTokens];  // of `in`
  using F = Form<kTokens, kRowWarps>;
  auto* buffers = reinterpret_cast<typename F::Buffer*>(dynamic);
  const uint32_t weight_rows = kGated ? 2 * p.width : p.width;
  const uint32_t first_row = blockIdx.x * F::kRows;
  F form;
  // The last block's rows end with the matrix; what it computes twice is the same.
  const uint32_t first = min(first_row, weight_rows - F::kRows);
  form.begin(static_cast<const bf16*>(p.weight) + (static_cast<uint64_t>(tile.expert) * weight_rows + first) * p.depth, p.depth);
  // The list of tiles was there before the kernel ahead began (see `grouped`); what that kernel computed is not.
  if (!kGated) grid_wait();
  if (threadIdx.x < tile.rows) {
    rows[threadIdx.x] = kGated ? p.source[tile.first + threadIdx.x] / p.top_k : tile.first + threadIdx.x;
  }
  __syncthreads();
  const bf16* in = static_cast<const bf16*>(p.in);
  Accumulator sum[F::kTiles] = {};
  form.run(buffers, sum, [&](uint32_t i) { return i < tile.rows ? in + static_cast<uint64_t>(rows[i]) * p.depth : nullptr; });
  form.gather(buffers, sum);
  if (F::depth_warp() > 0) return;
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const uint32_t channel = kGated ? (first + F::row_warp() * 16) / 2 + g : first + F::row_warp() * 16 + g;
#pragma unroll
  for (int n = 0; n < F::kTiles; n++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const uint32_t row = n * 8 + t * 2 + e;
      if (row >= tile.rows) continue;
      bf16* to = static_cast<bf16*>(p.out) + static_cast<uint64_t>(tile.first + row) * p.width + channel;
      if constexpr (kGated) {
        // Eight gate rows, then the eight up rows of the same channels.
        to[0] = narrow<bf16>(silu(sum[n].x[e]) * sum[n].x[2 + e]);
      } else {
        to[0] = narrow<bf16>(sum[n].x[e]);
        to[8] = narrow<bf16>(sum[n].x[2 + e]);
      }
    }
  }
}

__device__ __forceinline__ MoeTile read_tile(const MoeProductParams& p, uint32_t at) {
  MoeTile tile;
  tile.expert = __ldcg(&p.tiles[at].expert);
  tile.first = __ldcg(&p.tiles[at].first);
  tile.rows = __ldcg(&p.tiles[at].rows);
  return tile;
}

// kTurns: the grid may be lower than the list is long. Tile i is that of block row i modulo the grid's height, so blocks with several
// tiles are those that begin first. Without it, which is a little faster where nearly all tiles have rows, the grid is as high as the list can be.
template <int kRowWarps, bool kGated, bool kTurns>
__device__ __forceinline__ void grouped(const MoeProductParams& p) {
  // Gate and up let the product down begin only once the list of tiles is there, so that it may read the list before it waits.
  if (kGated) grid_wait();
  grid_trigger();
  // The list has room for as many tiles as the grid has; beyond the count, what is read is not used.
  const uint32_t count = __ldcg(p.tile_count);
  const MoeTile tile = read_tile(p, blockIdx.y);
  if (blockIdx.y >= count) {
    if (!kGated) grid_wait();
    return;
  }
  // Blocks with several tiles have code of their own: as one loop the compiler runs out of registers for all three forms. A row's result is
  // the same in each form: the order of its sum does not depend on kTokens.
  if (kTurns && blockIdx.y + gridDim.y < count) {
#pragma unroll 1
    for (uint32_t at = blockIdx.y; at < count; at += gridDim.y) {
      // Every warp is done with the tile before and its shared memory.
      __syncthreads();
      const MoeTile turn = read_tile(p, at);
      if (turn.rows <= 8) {
        product<8, kRowWarps, kGated>(p, turn);
      } else {
        product<32, kRowWarps, kGated>(p, turn);
      }
    }
    return;
  }
  if (tile.rows <= 8) {
    product<8, kRowWarps, kGated>(p, tile);
  } else if (tile.rows <= 16) {
    product<16, kRowWarps, kGated>(p, tile);
  } else {
    product<32, kRowWarps, kGated>(p, tile);
  }
}

#define MOE_SKINNY(name, row_warps, turns)                                                                                            \
  extern "C" __global__ void __launch_bounds__(kSkinnyThreads, 2) moe_gate_up_skinny_##name(const __grid_constant__ MoeProductParams p) { \
    grouped<row_warps, true, turns>(p);                                                                                               \
  }                                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(kSkinnyThreads, 2) moe_down_skinny_##name(const __grid_constant__ MoeProductParams p) { \
    grouped<row_warps, false, turns>(p);                                                                                              \
  }                                                                                                                                   \
  static_assert(Form<32, row_warps>::kShared == 2 * 32 * (64 * 3 * (8 / row_warps) + 32) * 2, "launcher's size");                     \
  static_assert(Form<16, row_warps>::kShared <= Form<32, row_warps>::kShared, "the same launch");
MOE_SKINNY(4_turns, 4, true)
MOE_SKINNY(8_turns, 8, true)
MOE_SKINNY(8, 8, false)
