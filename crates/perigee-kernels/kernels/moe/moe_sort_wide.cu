// The sort of (token, choice) entries by expert for steps of many tokens: blocks count their entries, then every block places its own
// behind those of the blocks before it. Experts' rows are cut into tiles as even as steps of 16 rows allow. See README.md.
#include "common/mma.cuh"
#include "moe/params.h"

constexpr int kRowStep = 16;

// Entries of a block, by expert.
extern "C" __global__ void __launch_bounds__(1024) moe_count(const __grid_constant__ MoeSpreadParams p) {
  extern __shared__ uint32_t counts[];  // [E]
  grid_dependency();
  for (uint32_t e = threadIdx.x; e < p.experts; e += blockDim.x) counts[e] = 0;
  __syncthreads();
  const uint32_t first = blockIdx.x * p.block_entries, last = min(first + p.block_entries, p.entries);
  for (uint32_t i = first + threadIdx.x; i < last; i += blockDim.x) {
    if (p.chosen[i] != kNoExpert) atomicAdd(&counts[p.chosen[i]], 1u);
  }
  __syncthreads();
  for (uint32_t e = threadIdx.x; e < p.experts; e += blockDim.x) p.counts[blockIdx.x * p.experts + e] = counts[e];
}

// Places of a block's entries; the first block also leaves the tiles. The order within an expert varies from run to run, which no
// result depends on.
extern "C" __global__ void __launch_bounds__(1024) moe_spread(const __grid_constant__ MoeSpreadParams p) {
  extern __shared__ uint32_t shared[];  // [E] rows of an expert, then [E] next row of this block
  grid_dependency();
  uint32_t* totals = shared;
  uint32_t* next = shared + p.experts;
  for (uint32_t e = threadIdx.x; e < p.experts; e += blockDim.x) {
    uint32_t before = 0, total = 0;
#pragma unroll 8
    for (uint32_t block = 0; block < gridDim.x; block++) {
      const uint32_t count = p.counts[block * p.experts + e];
      if (block < blockIdx.x) before += count;
      total += count;
    }
    totals[e] = total;
    next[e] = before;
  }
  __syncthreads();
  if (threadIdx.x < kWarp) {
    uint32_t rows_before = 0, tiles_before = 0, touched = 0;
    for (uint32_t base = 0; base < p.experts; base += kWarp) {
      const uint32_t expert = base + threadIdx.x;
      const uint32_t count = expert < p.experts ? totals[expert] : 0;
      const uint32_t parts = (count + p.tile_rows - 1) / p.tile_rows;
      const uint32_t size = parts > 0 ? ((count + parts - 1) / parts + kRowStep - 1) / kRowStep * kRowStep : 1;
      const uint32_t tiles = (count + size - 1) / size;
      touched += __popc(__ballot_sync(~0u, count > 0 && expert < p.routed));
      uint32_t rows_to = count, tiles_to = tiles;
#pragma unroll
      for (int distance = 1; distance < kWarp; distance *= 2) {
        const uint32_t r = __shfl_up_sync(~0u, rows_to, distance);
        const uint32_t t = __shfl_up_sync(~0u, tiles_to, distance);
        if (threadIdx.x >= distance) {
          rows_to += r;
          tiles_to += t;
        }
      }
      const uint32_t first_row = rows_before + rows_to - count;
      const uint32_t first_tile = tiles_before + tiles_to - tiles;
      if (blockIdx.x == 0) {
        for (uint32_t t = 0; t < tiles; t++) p.tiles[first_tile + t] = {expert, first_row + t * size, min(size, count - t * size)};
      }
      if (expert < p.experts) next[expert] += first_row;
      rows_before += __shfl_sync(~0u, rows_to, kWarp - 1);
      tiles_before += __shfl_sync(~0u, tiles_to, kWarp - 1);
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      p.tile_count[0] = tiles_before;
      p.tile_count[1] = rows_before;
      *p.touched += touched;
    }
  }
  __syncthreads();
  const uint32_t first = blockIdx.x * p.block_entries, last = min(first + p.block_entries, p.entries);
  for (uint32_t i = first + threadIdx.x; i < last; i += blockDim.x) {
    if (p.chosen[i] == kNoExpert) {
      p.position[i] = kNoExpert;
      continue;
    }
    const uint32_t row = atomicAdd(&next[p.chosen[i]], 1u);
    p.source[row] = i;
    p.position[i] = row;
  }
}

// Rows of x in the order of the sort, a warp two rows.
extern "C" __global__ void __launch_bounds__(256) moe_gather(const __grid_constant__ MoeGatherParams p) {
  grid_dependency();
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t first = (blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp) * 2;
  // The list of sources is long enough, whatever the number of rows.
  const uint2 source = *reinterpret_cast<const uint2*>(p.source + first);
  const uint32_t rows = *p.rows;
#pragma unroll
  for (uint32_t i = 0; i < 2; i++) {
    if (first + i >= rows) return;
    const uint4* from = static_cast<const uint4*>(p.x) + static_cast<uint64_t>((i ? source.y : source.x) / p.top_k) * p.pieces;
    uint4* to = static_cast<uint4*>(p.out) + static_cast<uint64_t>(first + i) * p.pieces;
#pragma unroll 9
    // What is written passes through the second-level cache once, and x, which is read for each of its choices, stays there.
    for (uint32_t at = lane; at < p.pieces; at += kWarp) __stcs(to + at, from[at]);
  }
}

// As `moe_combine`, for many tokens of bfloat16 in rows of whole 16 bytes: eight rows are under way at a time.
extern "C" __global__ void __launch_bounds__(1024) moe_combine_wide(const __grid_constant__ MoeCombineParams p) {
  constexpr int kBatch = 8;
  grid_dependency();
  const uint64_t token = blockIdx.x;
  const uint32_t* positions = p.position + token * p.top_k;
  const float* weights = p.weights + token * p.top_k;
  // A token that pads the step: nobody looks at what it leaves.
  if (positions[0] == kNoExpert) return;
  for (uint32_t i = threadIdx.x * 8; i < p.hidden; i += blockDim.x * 8) {
    float sum[8] = {};
    auto add = [&](const uint4& piece, float weight) {
      const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&piece);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float2 x = __bfloat1622float2(pairs[e]);
        sum[e * 2] += weight * x.x;
        sum[e * 2 + 1] += weight * x.y;
      }
    };
    for (uint32_t base = 0; base < p.top_k; base += kBatch) {
      uint4 rows[kBatch];
#pragma unroll
      for (int choice = 0; choice < kBatch; choice++) {
        // Beyond the last choice its row again, with weight 0.
        const uint32_t row = positions[min(base + choice, p.top_k - 1)];
        rows[choice] = *reinterpret_cast<const uint4*>(static_cast<const bf16*>(p.rows) + static_cast<uint64_t>(row) * p.hidden + i);
      }
#pragma unroll
      for (int choice = 0; choice < kBatch; choice++) add(rows[choice], base + choice < p.top_k ? weights[base + choice] : 0.0f);
    }
    if (p.shared) add(*reinterpret_cast<const uint4*>(static_cast<const bf16*>(p.shared) + token * p.hidden + i), 1.0f);
    uint4 out;
    out.x = pack(sum[0], sum[1]);
    out.y = pack(sum[2], sum[3]);
    out.z = pack(sum[4], sum[5]);
    out.w = pack(sum[6], sum[7]);
    *reinterpret_cast<uint4*>(static_cast<bf16*>(p.out) + token * p.hidden + i) = out;
  }
}
