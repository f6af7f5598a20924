// Grouped products for experts of few rows each, bound by reading the experts' weights: up to 32 rows of one expert by 64 or 128
// weight rows a block, by gemm/skinny.cuh. See README.md.
#include "gemm/skinny.cuh"
#include "moe/params.h"

// kDeep: tokens are asked for two buffers ahead, not one.
template <int kTokens, int kRowWarps, bool kDeep>
using Form = Skinny<kTokens, kRowWarps, kDeep ? 3 : 2, kTokens == 48 ? 2 : kTokens == 32 ? 3 : 4>;

// kAgain: a block may have had a tile before this one.
template <int kTokens, int kRowWarps, bool kDeep, bool kGated, bool kAgain>
__device__ __forceinline__ void product(const MoeProductParams& p, const MoeTile& tile) {
  extern __shared__ uint4 dynamic[];
  __shared__ uint32_t rows[kTokens];  // of `in`
  using F = Form<kTokens, kRowWarps, kDeep>;
  auto* buffers = reinterpret_cast<typename F::Buffer*>(dynamic);
  const uint32_t weight_rows = kGated ? 2 * p.width : p.width;
  const uint32_t first_row = blockIdx.x * F::kRows;
  F form;
  // The last block's rows end with the matrix; what it computes twice is the same.
  const uint32_t first = min(first_row, weight_rows - F::kRows);
  form.begin(static_cast<const bf16*>(p.weight) + (static_cast<uint64_t>(tile.expert) * weight_rows + first) * p.depth, p.depth);
  // The list of tiles was there before the kernel ahead began (see `grouped`); what that kernel computed is not.
  if (!kGated) grid_wait();
  // Every warp is done with the tile before, while the first weights of this one are on their way.
  if (kAgain) __syncthreads();
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

// Asks for the last `ahead` experts' weights in the second-level cache, a piece a block: the device memory is idle while tokens choose
// their experts, and a shared expert, the last, is chosen by all.
__device__ __forceinline__ void ask_ahead(const MoeProductParams& p) {
  constexpr uint32_t kPiece = 16 << 10;
  const uint32_t block = blockIdx.y * gridDim.x + blockIdx.x;
  if (block >= p.ahead_blocks || threadIdx.x > 0) return;
  const uint64_t expert = 2ull * p.width * p.depth * sizeof(bf16), bytes = p.ahead * expert;
  const uint64_t share = (bytes / p.ahead_blocks + 15) / 16 * 16, end = min((block + 1) * share, bytes);
  const uint8_t* from = static_cast<const uint8_t*>(p.weight) + (p.experts - p.ahead) * expert;
  for (uint64_t at = block * share; at < end; at += kPiece) {
    const uint32_t size = static_cast<uint32_t>(min(static_cast<uint64_t>(kPiece), end - at));
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from + at), "r"(size) : "memory");
  }
}

__device__ __forceinline__ MoeTile read_tile(const MoeProductParams& p, uint32_t at) {
  MoeTile tile;
  tile.expert = __ldcg(&p.tiles[at].expert);
  tile.first = __ldcg(&p.tiles[at].first);
  tile.rows = __ldcg(&p.tiles[at].rows);
  return tile;
}

// With kStay the grid has as many blocks as there is room for, which stay for several tiles; else a block for every tile that there may
// be, of which many have none: each of those takes its place for a microsecond, and what comes behind begins only after them.
template <int kRowWarps, int kMostTokens, bool kDeep, bool kGated, bool kStay>
__device__ __forceinline__ void grouped(const MoeProductParams& p) {
  if (kGated && p.ahead > 0) ask_ahead(p);
  // Gate and up let the product down begin only once the list of tiles is there, so that it may read the list before it waits.
  if (kGated) grid_wait();
  grid_trigger();
#pragma unroll 1
  for (uint32_t at = blockIdx.y;; at += gridDim.y) {
    // The list has room for as many tiles as a grid without kStay has; beyond the count, what is read is not used.
    const uint32_t count = __ldcg(p.tile_count);
    const MoeTile tile = read_tile(p, kGated && p.ahead > 0 && at < count ? count - 1 - at : at);
    if (at >= count) {
      if (!kGated) grid_wait();
      return;
    }
    // With one form more the compiler runs out of registers.
    if (!kStay && kMostTokens == 32 && tile.rows <= 8) {
      product<8, kRowWarps, kDeep, kGated, kStay>(p, tile);
    } else if (tile.rows <= 16) {
      product<16, kRowWarps, kDeep, kGated, kStay>(p, tile);
    } else if (kMostTokens == 32 || tile.rows <= 32) {
      product<32, kRowWarps, kDeep, kGated, kStay>(p, tile);
    } else {
      product<kMostTokens, kRowWarps, kDeep, kGated, kStay>(p, tile);
    }
    if (!kStay) return;
  }
}

#define MOE_SKINNY(name, row_warps, tokens, deep, stay)                                                                               \
  extern "C" __global__ void __launch_bounds__(kSkinnyThreads, 2) moe_gate_up_skinny_##name(const __grid_constant__ MoeProductParams p) { \
    grouped<row_warps, tokens, deep, true, stay>(p);                                                                                  \
  }                                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(kSkinnyThreads, 2) moe_down_skinny_##name(const __grid_constant__ MoeProductParams p) { \
    grouped<row_warps, tokens, deep, false, stay>(p);                                                                                 \
  }                                                                                                                                   \
  static_assert(Form<32, row_warps, deep>::kShared == (deep ? 3 : 2) * 32 * (64 * 3 * (8 / row_warps) + 32) * 2, "launcher's size");  \
  static_assert(Form<16, row_warps, deep>::kShared <= Form<32, row_warps, deep>::kShared, "the same launch");                         \
  static_assert(tokens == 32 || Form<48, row_warps, deep>::kShared == 2 * 48 * (64 * 2 * (8 / row_warps) + 32) * 2, "launcher's size");
MOE_SKINNY(4, 4, 32, false, false)
MOE_SKINNY(8, 8, 32, false, false)
MOE_SKINNY(4_stay, 4, 32, false, true)
MOE_SKINNY(8_stay, 8, 32, false, true)
MOE_SKINNY(8_deep, 8, 32, true, false)
MOE_SKINNY(8_tall, 8, 48, false, false)
