// The experts' products of one token, bound by reading its experts' weights, by gemm/single.cuh; and the weighted sum of its experts.
// No list of tiles: an entry's place is its choice. See README.md.
#include "gemm/single.cuh"
#include "moe/params.h"

constexpr uint32_t kMostChoices = 32;
constexpr uint32_t kMostDots = 512;  // of a block

// Gate and up of a channel by one warp, one after the other. Shared experts come first: which they are is known ahead.
template <int kPieces>
__device__ __forceinline__ void gate_up(const MoeSingleParams& p) {
  extern __shared__ uint4 memory[];
  __shared__ alignas(8) uint64_t barriers[kSingleWarps][kSingleStages];
  __shared__ uint32_t experts[kSingleWarps][kMostChoices];
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t first = warp * gridDim.x + blockIdx.x, step = kSingleWarps * gridDim.x;
  const uint32_t channels = p.choices * p.width, routed = p.choices - p.shared;
  const bf16* weight = static_cast<const bf16*>(p.weight);
  // Place of a channel in the order of work to its choice.
  auto choice_of = [&](uint32_t place) { return place < p.shared ? routed + place : place - p.shared; };
  auto row_of = [&](uint32_t expert, uint32_t channel, uint32_t half) {
    const uint64_t row = static_cast<uint64_t>(expert) * 2 * p.width + channel / 8 * 16 + half * 8 + channel % 8;
    return weight + row * p.depth;
  };
  SingleRing ring(memory, barriers, p.stages, p.depth);
  // Rows are asked for in turn: gate and up of the channels `first`, `first + step` and so on.
  uint32_t at = first, half = 0, asked = 0;
  if (lane == 0) {
    for (; asked < p.stages && at < p.shared * p.width; asked++) {
      ring.ask(row_of(p.experts + at / p.width, at % p.width, half));
      at += half ? step : 0;
      half ^= 1;
    }
  }
  grid_wait();
  if (lane < p.choices) experts[warp][lane] = __ldcg(p.chosen + lane);
  __syncwarp();
  // A token that pads the step has no experts.
  const bool is_live = experts[warp][0] != kNoExpert;
  const uint32_t end = is_live ? channels : p.shared * p.width;
  auto ask_next = [&] {
    if (at >= end) return;
    ring.ask(row_of(experts[warp][choice_of(at / p.width)], at % p.width, half));
    at += half ? step : 0;
    half ^= 1;
  };
  if (lane == 0) {
    for (; asked < p.stages; asked++) ask_next();
  }
  SingleToken<kPieces> token;
  token.read(static_cast<const bf16*>(p.in), p.depth);
  // The product down reads the choices before it waits, which are there, and its own weights: it begins when nothing is left to be
  // asked for here.
  bool has_triggered = false;
  for (uint32_t mine = first; mine < end; mine += step) {
    if (!has_triggered && mine + 2 * step >= end) {
      grid_trigger();
      has_triggered = true;
    }
    float sums[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      sums[i] = token.product(ring.wait());
      ring.next();
      if (lane == 0) ask_next();
    }
    if (lane == 0) {
      const uint32_t to = choice_of(mine / p.width) * p.width + mine % p.width;
      static_cast<bf16*>(p.out)[to] = narrow<bf16>(silu(sums[0]) * sums[1]);
    }
  }
}

// A block has the rows of some channels of all of the token's experts, and adds them up in the order of choices. kGroup neighbouring
// channels of an expert, which lie together, are one piece for the copy engine, and their sums go side by side.
template <int kPieces, int kGroup>
__device__ __forceinline__ void down(const MoeSingleParams& p) {
  extern __shared__ uint4 memory[];
  __shared__ alignas(8) uint64_t barriers[kSingleWarps][kSingleStages];
  __shared__ float dots[kMostDots];
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t pieces = p.depth / 8, groups = p.width / kGroup;
  uint4* inner = memory + kSingleWarps * p.stages * kGroup * pieces;  // [choices][pieces]
  SingleRing ring(memory, barriers, p.stages, kGroup * p.depth);
  // The choices were there before the kernel ahead began (see `gate_up`); what that kernel computed is not.
  const uint32_t own = lane < p.choices ? __ldcg(p.chosen + lane) : 0;
  const bool is_live = __shfl_sync(~0u, own, 0) != kNoExpert;
  const uint32_t mine = blockIdx.x < groups ? (groups - blockIdx.x - 1) / gridDim.x + 1 : 0;  // groups of channels
  const uint32_t count = is_live ? mine * p.choices : 0;
  const bf16* weight = static_cast<const bf16*>(p.weight);
  auto ask = [&](uint32_t dot) {
    if (dot >= count) return;
    const uint32_t expert = __shfl_sync(~0u, own, dot % p.choices);
    const uint64_t row = static_cast<uint64_t>(expert) * p.width + (blockIdx.x + dot / p.choices * gridDim.x) * kGroup;
    if (lane == 0) ring.ask(weight + row * p.depth);
  };
  uint32_t ahead = warp;
  for (uint32_t i = 0; i < p.stages; i++, ahead += kSingleWarps) ask(ahead);
  const float scale = lane < p.choices ? __ldcg(p.weights + lane) : 0.0f;
  grid_wait();
  for (uint32_t i = threadIdx.x; i < p.choices * pieces; i += kSingleThreads) inner[i] = static_cast<const uint4*>(p.in)[i];
  __syncthreads();
  bool has_triggered = false;
  for (uint32_t dot = warp; dot < count; dot += kSingleWarps, ahead += kSingleWarps) {
    if (!has_triggered && ahead >= count) {
      grid_trigger();
      has_triggered = true;
    }
    const uint4* row = ring.wait();
    const uint4* x = inner + dot % p.choices * pieces;
    float sum[kGroup][2] = {};
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      const uint32_t piece = lane + i * kWarp;
      if (piece < pieces) {
        const uint4 own_x = x[piece];
#pragma unroll
        for (int g = 0; g < kGroup; g++) multiply_add(sum[g], row[g * pieces + piece], own_x);
      }
    }
    float whole[kGroup];
#pragma unroll
    for (int g = 0; g < kGroup; g++) whole[g] = warp_sum(sum[g][0] + sum[g][1]);
    ring.next();
    ask(ahead);
    // An expert's row is rounded as if it had been stored.
    const float factor = __shfl_sync(~0u, scale, dot % p.choices);
#pragma unroll
    for (int g = 0; g < kGroup; g++) {
      if (lane == 0) dots[dot * kGroup + g] = rounded<bf16>(whole[g]) * factor;
    }
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < mine * kGroup && is_live; i += kSingleThreads) {
    const uint32_t group = i / kGroup, within = i % kGroup;
    float sum = 0.0f;
    for (uint32_t choice = 0; choice < p.choices; choice++) sum += dots[(group * p.choices + choice) * kGroup + within];
    static_cast<bf16*>(p.out)[(blockIdx.x + group * gridDim.x) * kGroup + within] = narrow<bf16>(sum);
  }
}

extern "C" __global__ void __launch_bounds__(kSingleThreads, 2) moe_gate_up_single(const __grid_constant__ MoeSingleParams p) { gate_up<9>(p); }
extern "C" __global__ void __launch_bounds__(kSingleThreads, 2) moe_down_single(const __grid_constant__ MoeSingleParams p) { down<4, 1>(p); }
extern "C" __global__ void __launch_bounds__(kSingleThreads, 2) moe_down_single_3(const __grid_constant__ MoeSingleParams p) { down<4, 3>(p); }
