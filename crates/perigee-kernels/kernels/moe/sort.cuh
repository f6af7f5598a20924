// What kernels that select experts and sort entries by them share.
#pragma once
#include "common/common.cuh"
#include "moe/params.h"

// Experts up to which a warp keeps the biased scores in registers.
constexpr uint32_t kLaneExperts = 8;
constexpr uint32_t kWarpExperts = kLaneExperts * kWarp;

// A number whose order as an integer is that of the value; 0, below all of them, for what is not a number.
__device__ __forceinline__ uint32_t sortable(float value) {
  if (value != value) return 0;
  const uint32_t bits = __float_as_uint(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// One warp: from entries of each expert to the first sorted row of each, with the list of tiles.
__device__ __forceinline__ void place_experts(const MoeSortParams& p, uint32_t* counts) {
  // A lane sums its consecutive experts, and one scan over the lanes does for all.
  const uint32_t share = (p.experts + kWarp - 1) / kWarp, from = threadIdx.x * share, to = min(from + share, p.experts);
  uint32_t rows = 0, tiles = 0, touched = 0;
  for (uint32_t expert = from; expert < to; expert++) {
    rows += counts[expert];
    tiles += (counts[expert] + p.tile_rows - 1) / p.tile_rows;
    touched += counts[expert] > 0 && expert < p.routed;
  }
  uint32_t row = rows, tile = tiles;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const uint32_t r = __shfl_up_sync(~0u, row, distance), t = __shfl_up_sync(~0u, tile, distance);
    if (threadIdx.x >= distance) {
      row += r;
      tile += t;
    }
  }
  touched = __reduce_add_sync(~0u, touched);
  if (threadIdx.x == kWarp - 1) {
    *p.tile_count = tile;
    *p.touched += touched;
  }
  row -= rows;
  tile -= tiles;
  for (uint32_t expert = from; expert < to; expert++) {
    const uint32_t count = counts[expert];
    for (uint32_t first = 0; first < count; first += p.tile_rows) {
      p.tiles[tile++] = {expert, row + first, min(p.tile_rows, count - first)};
    }
    counts[expert] = row;
    row += count;
  }
}
