// Position-weighted sums over a state slot: what both sides of a move compare. Element number i of a tensor (counted over the
// heads of the whole model) with bits b contributes (i + 1) b, modulo 2^64, so the order of additions does not matter.
#include "common/common.cuh"
#include "state/params.h"

using Sum = unsigned long long;

constexpr int kThreads = 256;

__device__ __forceinline__ uint32_t bits(uint32_t word) { return word; }
__device__ __forceinline__ uint32_t bits(uint16_t half) { return half; }

// Adds the block's sum to `out`.
__device__ __forceinline__ void add_block(Sum sum, Sum* out) {
  __shared__ Sum warps[kThreads / kWarp];
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kThreads / kWarp; ++warp) sum += warps[warp];
    atomicAdd(out, sum);
  }
}

// Grid: (blocks of a tensor, layers, 4 tensors). `Bits` is the unsigned integer of a tail's element.
template <class Bits>
__device__ __forceinline__ void state_sums(const StateSumParams& p) {
  const uint64_t layer = blockIdx.y;
  const uint32_t width = p.heads * p.head_dim;
  const uint32_t first = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t step = gridDim.x * kThreads;
  Sum sum = 0;
  if (blockIdx.z == 0) {
    const uint32_t head = p.head_dim * p.head_dim;
    const uint32_t count = p.heads * head;
    const uint32_t* words = p.state + layer * count;
    const Sum weight = static_cast<Sum>(p.first_head) * head + 1;
#pragma unroll 4
    for (uint32_t i = first; i < count; i += step) sum += (weight + i) * words[i];
  } else {
    // A handoff has the tails channel by channel, the slot has them input by input.
    const Bits* tails = static_cast<const Bits*>(p.tails) + layer * p.tail * 3 * width + (blockIdx.z - 1) * width;
    for (uint32_t t = 0; t < p.tail; ++t) {
      for (uint32_t c = first; c < width; c += step) {
        const Sum channel = static_cast<Sum>(p.first_head) * p.head_dim + c;
        sum += (channel * p.tail + t + 1) * bits(tails[static_cast<uint64_t>(t) * 3 * width + c]);
      }
    }
  }
  add_block(sum, p.sums + layer * 4 + blockIdx.z);
}

extern "C" __global__ void __launch_bounds__(kThreads) state_sums_fp32(const StateSumParams p) { state_sums<uint32_t>(p); }
extern "C" __global__ void __launch_bounds__(kThreads) state_sums_bf16(const StateSumParams p) { state_sums<uint16_t>(p); }
