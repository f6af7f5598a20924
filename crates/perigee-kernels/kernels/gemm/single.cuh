// One token times rows of weights, bound by reading them. Every warp has a ring of rows in shared memory, which the copy engine fills;
// no warp waits for another. The token lies in registers. See README.md.
#pragma once
#include "common/hopper.cuh"

constexpr int kSingleWarps = 8;
constexpr int kSingleThreads = kSingleWarps * kWarp;
constexpr int kSingleStages = 8;  // of a ring, at most

// Adds the products of eight numbers each, two sums for shorter chains.
__device__ __forceinline__ void multiply_add(float (&sum)[2], const uint4& w, const uint4& x) {
  const uint32_t a[4] = {w.x, w.y, w.z, w.w}, b[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    sum[0] += __uint_as_float(a[i] << 16) * __uint_as_float(b[i] << 16);
    sum[1] += __uint_as_float(a[i] & 0xffff0000u) * __uint_as_float(b[i] & 0xffff0000u);
  }
}

// The rows of one warp, in turn.
struct SingleRing {
  uint4* rows;          // [stages][pieces]
  uint64_t* barriers;   // [stages]
  uint32_t stages;
  uint32_t pieces;      // of 16 bytes a row
  uint32_t asked = 0;   // rows so far
  uint32_t slot = 0;    // of the next row to be used
  uint32_t parity = 0;
  uint32_t free = 0;    // slot of the next row to be asked for

  // `memory` is the block's, [warps][stages][pieces]; `barriers` [warps][kSingleStages].
  __device__ __forceinline__ SingleRing(uint4* memory, uint64_t (*block_barriers)[kSingleStages], uint32_t count, uint32_t depth)
      : stages(count), pieces(depth / 8) {
    const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    rows = memory + static_cast<uint64_t>(warp) * stages * pieces;
    barriers = block_barriers[warp];
    if (lane < stages) barrier_init(&barriers[lane], 1);
    barrier_init_done();
    __syncwarp();
  }

  // By one lane. There is room for `stages` rows that are not yet used.
  __device__ __forceinline__ void ask(const bf16* row) {
    barrier_arrive_expecting(&barriers[free], pieces * 16);
    copy_once(rows + static_cast<uint64_t>(free) * pieces, row, pieces * 16, &barriers[free]);
    free = free + 1 == stages ? 0 : free + 1;
  }

  // The next row, once it is there; by the whole warp.
  __device__ __forceinline__ const uint4* wait() {
    barrier_wait(&barriers[slot], parity);
    return rows + static_cast<uint64_t>(slot) * pieces;
  }

  // The row is used, and its place free; by the whole warp.
  __device__ __forceinline__ void next() {
    __syncwarp();
    slot++;
    if (slot == stages) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// A token of up to 256 kPieces numbers, eight in every 256 a lane.
template <int kPieces>
struct SingleToken {
  uint4 x[kPieces];
  uint32_t pieces;

  __device__ __forceinline__ void read(const bf16* from, uint32_t depth) {
    const uint32_t lane = threadIdx.x % kWarp;
    pieces = depth / 8;
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      const uint32_t piece = lane + i * kWarp;
      x[i] = piece < pieces ? reinterpret_cast<const uint4*>(from)[piece] : make_uint4(0, 0, 0, 0);
    }
  }

  // Its product with a row, in every lane.
  __device__ __forceinline__ float product(const uint4* row) const {
    const uint32_t lane = threadIdx.x % kWarp;
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      const uint32_t piece = lane + i * kWarp;
      if (piece < pieces) multiply_add(sum, row[piece], x[i]);
    }
    return warp_sum(sum[0] + sum[1]);
  }
};
