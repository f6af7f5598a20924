// Grouped products on tensor cores: rows of one expert by 128 weight rows a block, bfloat16 operands through a ring of
// asynchronous copies, float32 sums. For gate and up the weight rows alternate in blocks of 8, so that a thread's neighbouring
// accumulators are gate and up of the same channels and the activation needs no exchange. See README.md.
#include "common/mma.cuh"
#include "moe/params.h"

constexpr int kColumns = 128;  // weight rows of a block
constexpr int kDepth = 64;     // of a stage
constexpr int kPitch = kDepth + 8;
constexpr int kThreads = 256;

template <int kRows, int kStages>
struct Shared {
  bf16 a[kStages][kRows][kPitch];
  bf16 b[kStages][kColumns][kPitch];
};

// kRows by kColumns; kRowWarps of the eight warps split the rows, the others the columns.
template <int kRows, int kRowWarps, int kStages, bool kGated>
__device__ __forceinline__ void product(const MoeProductParams& p) {
  extern __shared__ uint4 dynamic[];
  using S = Shared<kRows, kStages>;
  S& s = *reinterpret_cast<S*>(dynamic);
  constexpr int kColumnWarps = kThreads / kWarp / kRowWarps;
  constexpr int kRowTiles = kRows / kRowWarps / 16;
  constexpr int kColumnTiles = kColumns / kColumnWarps / 8;
  constexpr int kChunks = kDepth / 8;               // 16-byte pieces of a row
  constexpr int kPass = kThreads / kChunks;         // rows copied at a time
  constexpr int kPasses = (kRows + kPass - 1) / kPass;
  grid_dependency();
  if (blockIdx.y >= *p.tile_count) return;
  const MoeTile tile = p.tiles[blockIdx.y];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row_warp = warp % kRowWarps, column_warp = warp / kRowWarps;
  const int copy_row = threadIdx.x / kChunks, copy_column = threadIdx.x % kChunks * 8;
  const uint32_t weight_rows = kGated ? 2 * p.width : p.width;
  const uint32_t first_column = blockIdx.x * kColumns;
  const bf16* weight = static_cast<const bf16*>(p.weight) + (static_cast<uint64_t>(tile.expert) * weight_rows + first_column) * p.depth;
  const bf16* in = static_cast<const bf16*>(p.in);

  const bf16* row_source[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; pass++) {
    const int row = copy_row + pass * kPass;
    row_source[pass] = nullptr;
    if (row < kRows && row < tile.rows) {
      const uint64_t from = kGated ? p.source[tile.first + row] / p.top_k : tile.first + row;
      row_source[pass] = in + from * p.depth;
    }
  }
  auto fetch = [&](int stage, uint32_t base) {
    const uint32_t at = base + copy_column;
    if (base < p.depth) {
#pragma unroll
      for (int pass = 0; pass < kPasses; pass++) {
        const int row = copy_row + pass * kPass;
        const bool valid = row_source[pass] != nullptr && at < p.depth;
        if (row < kRows) copy_async(&s.a[stage][row][copy_column], valid ? row_source[pass] + at : in, valid);
      }
#pragma unroll
      for (int pass = 0; pass < kColumns / kPass; pass++) {
        const int column = copy_row + pass * kPass;
        const bool valid = first_column + column < weight_rows && at < p.depth;
        copy_async(&s.b[stage][column][copy_column], valid ? weight + static_cast<uint64_t>(column) * p.depth + at : weight, valid);
      }
    }
    copy_commit();
  };

#pragma unroll
  for (int stage = 0; stage < kStages - 1; stage++) fetch(stage, stage * kDepth);
  Accumulator sum[kRowTiles][kColumnTiles] = {};
  int stage = 0;
  for (uint32_t base = 0; base < p.depth; base += kDepth) {
    copy_wait<kStages - 2>();
    // Also: every warp is done with the stage that is filled next.
    __syncthreads();
    fetch((stage + kStages - 1) % kStages, base + (kStages - 1) * kDepth);
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      FragmentA a[kRowTiles];
      FragmentB b[kColumnTiles];
#pragma unroll
      for (int m = 0; m < kRowTiles; m++) a[m] = load_a(&s.a[stage][(row_warp * kRowTiles + m) * 16][k], kPitch, lane);
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        FragmentB pair[2];
        load_b_pair_transposed(pair, &s.b[stage][(column_warp * kColumnTiles + n) * 8][k], kPitch, lane);
        b[n] = pair[0];
        b[n + 1] = pair[1];
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; m++) {
#pragma unroll
        for (int n = 0; n < kColumnTiles; n++) mma(sum[m][n], a[m], b[n]);
      }
    }
    stage = (stage + 1) % kStages;
  }

  const int g = lane / 4, t = lane % 4;
  bf16* out = static_cast<bf16*>(p.out);
#pragma unroll
  for (int m = 0; m < kRowTiles; m++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = (row_warp * kRowTiles + m) * 16 + g + half * 8;
      if (row >= tile.rows) continue;
      bf16* to = out + static_cast<uint64_t>(tile.first + row) * p.width;
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += kGated ? 2 : 1) {
        const uint32_t column = first_column + (column_warp * kColumnTiles + n) * 8;
        if (column >= weight_rows) continue;
        const float x = sum[m][n].x[half * 2], y = sum[m][n].x[half * 2 + 1];
        if constexpr (kGated) {
          const float up_x = sum[m][n + 1].x[half * 2], up_y = sum[m][n + 1].x[half * 2 + 1];
          *reinterpret_cast<uint32_t*>(to + column / 2 + t * 2) = pack(silu(x) * up_x, silu(y) * up_y);
        } else {
          *reinterpret_cast<uint32_t*>(to + column + t * 2) = pack(x, y);
        }
      }
    }
  }
}

#define MOE_PRODUCT(rows, row_warps, stages)                                                                               \
  extern "C" __global__ void __launch_bounds__(kThreads, 2) moe_gate_up_tensor_##rows(const __grid_constant__ MoeProductParams p) { \
    product<rows, row_warps, stages, true>(p);                                                                             \
  }                                                                                                                        \
  extern "C" __global__ void __launch_bounds__(kThreads, 2) moe_down_tensor_##rows(const __grid_constant__ MoeProductParams p) { \
    product<rows, row_warps, stages, false>(p);                                                                            \
  }
MOE_PRODUCT(16, 1, 5)

// Size of the dynamic shared memory, as the launcher computes it.
static_assert(sizeof(Shared<16, 5>) == 5 * (16 + 128) * 72 * 2, "launcher's size");
