// The router: scores in float32, grouped top-k on biased scores, weights from unbiased ones, and the sort of (token, choice)
// entries by expert that the grouped products need. See README.md.
#include "common/common.cuh"
#include "common/faults.cuh"
#include "moe/params.h"

constexpr int kRouterTokens = 4;    // tokens of a warp: the weight row is read once for all of them
constexpr int kRouterExperts = 4;   // experts of a block
constexpr int kRouterWarps = 2;     // warps that share an expert
constexpr int kRouterReads = 9;     // 16-byte reads of weights that a thread has under way

// Few tokens, for which reading the weights is the work: two warps an expert, for kRouterTokens tokens. The weights are asked for
// before the kernel ahead has ended, since nothing writes them.
template <class T>
__device__ __forceinline__ void router(const MoeRouterParams& p) {
  constexpr int kStep = kRouterWarps * kWarp * 4;
  __shared__ float parts[kRouterExperts][kRouterTokens];
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t place = warp / kRouterWarps, half = warp % kRouterWarps;
  const uint32_t expert = blockIdx.x * kRouterExperts + place;
  const uint32_t first = blockIdx.y * kRouterTokens;
  const float* weight = p.weight + static_cast<uint64_t>(min(expert, p.experts - 1)) * p.hidden;
  const bool wide = p.hidden % 4 == 0;
  Quad ahead[kRouterReads];
#pragma unroll
  for (int r = 0; r < kRouterReads; r++) {
    const uint32_t i = (half * kWarp + lane) * 4 + r * kStep;
    ahead[r] = wide && i < p.hidden ? read4(weight + i) : Quad{};
  }
  grid_dependency();
  // Rows beyond the last token are read as the last one again, and not written.
  const T* x[kRouterTokens];
#pragma unroll
  for (int t = 0; t < kRouterTokens; t++) x[t] = static_cast<const T*>(p.x) + static_cast<uint64_t>(min(first + t, p.tokens - 1)) * p.hidden;
  float sums[kRouterTokens] = {};
  auto add = [&](const Quad& w, uint32_t i) {
#pragma unroll
    for (int t = 0; t < kRouterTokens; t++) {
      const Quad v = read4(x[t] + i);
#pragma unroll
      for (int e = 0; e < 4; e++) sums[t] += w.x[e] * v.x[e];
    }
  };
  if (wide) {
#pragma unroll
    for (int r = 0; r < kRouterReads; r++) {
      const uint32_t i = (half * kWarp + lane) * 4 + r * kStep;
      if (i < p.hidden) add(ahead[r], i);
    }
    for (uint32_t i = (half * kWarp + lane) * 4 + kRouterReads * kStep; i < p.hidden; i += kStep) add(read4(weight + i), i);
  } else {
    for (uint32_t i = half * kWarp + lane; i < p.hidden; i += kRouterWarps * kWarp) {
#pragma unroll
      for (int t = 0; t < kRouterTokens; t++) sums[t] += weight[i] * widen(x[t][i]);
    }
  }
#pragma unroll
  for (int t = 0; t < kRouterTokens; t++) {
    sums[t] = warp_sum(sums[t]);
    if (half == 1 && lane == 0) parts[place][t] = sums[t];
  }
  __syncthreads();
  if (half == 0 && lane == 0 && expert < p.experts) {
#pragma unroll
    for (int t = 0; t < kRouterTokens; t++) {
      if (first + t < p.tokens) p.scores[static_cast<uint64_t>(first + t) * p.experts + expert] = sums[t] + parts[place][t];
    }
  }
}

// Many tokens: 64 tokens by 64 experts a block, 4 by 4 a thread, float32 throughout.
template <class T>
__device__ __forceinline__ void router_tile(const MoeRouterParams& p) {
  constexpr int kTile = 64, kDepth = 16;
  __shared__ float a[kDepth][kTile + 4];
  __shared__ float b[kDepth][kTile + 4];
  grid_dependency();
  const uint32_t first_expert = blockIdx.x * kTile, first_token = blockIdx.y * kTile;
  const uint32_t tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const uint32_t load_depth = threadIdx.x % kDepth, load_row = threadIdx.x / kDepth;
  float next_a[4], next_b[4];
  auto fetch = [&](uint32_t base) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t token = first_token + load_row + 16 * i, expert = first_expert + load_row + 16 * i, at = base + load_depth;
      next_a[i] = token < p.tokens && at < p.hidden ? widen(static_cast<const T*>(p.x)[static_cast<uint64_t>(token) * p.hidden + at]) : 0.0f;
      next_b[i] = expert < p.experts && at < p.hidden ? p.weight[static_cast<uint64_t>(expert) * p.hidden + at] : 0.0f;
    }
  };
  float sum[4][4] = {};
  fetch(0);
  for (uint32_t base = 0; base < p.hidden; base += kDepth) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      a[load_depth][load_row + 16 * i] = next_a[i];
      b[load_depth][load_row + 16 * i] = next_b[i];
    }
    __syncthreads();
    fetch(base + kDepth);
#pragma unroll
    for (int k = 0; k < kDepth; k++) {
      const Quad x = read4(&a[k][ty * 4]), w = read4(&b[k][tx * 4]);
#pragma unroll
      for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) sum[i][j] += x.x[i] * w.x[j];
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
      if (token < p.tokens && expert < p.experts) p.scores[static_cast<uint64_t>(token) * p.experts + expert] = sum[i][j];
    }
  }
}

extern "C" __global__ void __launch_bounds__(256) moe_router_fp32(const __grid_constant__ MoeRouterParams p) { router<float>(p); }
extern "C" __global__ void __launch_bounds__(256) moe_router_bf16(const __grid_constant__ MoeRouterParams p) { router<bf16>(p); }
extern "C" __global__ void __launch_bounds__(256) moe_router_tile_fp32(const __grid_constant__ MoeRouterParams p) { router_tile<float>(p); }
extern "C" __global__ void __launch_bounds__(256) moe_router_tile_bf16(const __grid_constant__ MoeRouterParams p) { router_tile<bf16>(p); }

// The largest value over a warp and its index; the lowest index wins ties. An index of ~0 means nothing was offered.
__device__ __forceinline__ void warp_argmax(float& value, uint32_t& index) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(~0u, value, distance);
    const uint32_t other_index = __shfl_xor_sync(~0u, index, distance);
    const bool take = other_index != ~0u && (index == ~0u || other > value || (other == value && other_index < index));
    if (take) {
      value = other;
      index = other_index;
    }
  }
}

// One warp a token. Shared memory of a warp: scores [E], biased scores [E], group scores [groups], chosen [k], chosen in order [k].
template <Fault kFault = Fault::kNone>
__device__ __forceinline__ void select(const MoeSelectParams& p) {
  extern __shared__ float shared[];
  grid_dependency();
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t token = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (token >= p.tokens) return;
  const uint64_t entry = static_cast<uint64_t>(token) * (p.top_k + p.shared);
  const bool is_live = token < *p.live;
  for (uint32_t choice = lane; choice < p.top_k + p.shared; choice += kWarp) {
    if (!is_live) p.chosen[entry + choice] = kNoExpert;
    if (is_live && choice >= p.top_k) {
      p.chosen[entry + choice] = p.experts + choice - p.top_k;
      p.weights[entry + choice] = 1.0f;
    }
  }
  if (!is_live) return;
  float* scores = shared + static_cast<uint64_t>(threadIdx.x / kWarp) * (2 * p.experts + p.groups + 2 * p.top_k);
  float* biased = scores + p.experts;
  float* group_scores = biased + p.experts;
  uint32_t* picked = reinterpret_cast<uint32_t*>(group_scores + p.groups);
  uint32_t* ordered = picked + p.top_k;
  const float* raw = p.scores + static_cast<uint64_t>(token) * p.experts;
  for (uint32_t e = lane; e < p.experts; e += kWarp) {
    scores[e] = sigmoid(raw[e]);
    biased[e] = scores[e] + p.bias[e];
  }
  __syncwarp();
  if (p.groups > 1) {
    const uint32_t size = p.experts / p.groups;
    for (uint32_t g = lane; g < p.groups; g += kWarp) {
      float best = -INFINITY, second = -INFINITY;
      for (uint32_t e = g * size; e < (g + 1) * size; e++) {
        second = fmaxf(second, fminf(best, biased[e]));
        best = fmaxf(best, biased[e]);
      }
      group_scores[g] = best + second;
    }
    __syncwarp();
    // A group is kept if fewer than top_groups groups come before it in the order (score, then lower number).
    for (uint32_t g = lane; g < p.groups; g += kWarp) {
      uint32_t before = 0;
      for (uint32_t other = 0; other < p.groups; other++) {
        before += group_scores[other] > group_scores[g] || (group_scores[other] == group_scores[g] && other < g);
      }
      if (before >= p.top_groups) {
        for (uint32_t e = g * size; e < (g + 1) * size; e++) biased[e] = -INFINITY;
      }
    }
    __syncwarp();
  }
  for (uint32_t choice = 0; choice < p.top_k; choice++) {
    float value = -INFINITY;
    uint32_t index = ~0u;
    for (uint32_t e = lane; e < p.experts; e += kWarp) {
      if (biased[e] > value) {
        value = biased[e];
        index = e;
      }
    }
    warp_argmax(value, index);
    // Not-a-number scores offer nothing; the choice number keeps indices in range, and the result is not-a-number anyway.
    if (index == ~0u) index = choice;
    if (lane == 0) {
      picked[choice] = index;
      biased[index] = -INFINITY;
    }
    __syncwarp();
  }
  const uint64_t to = static_cast<uint64_t>(token) * p.top_k;
  for (uint32_t choice = lane; choice < p.top_k; choice += kWarp) {
    uint32_t before = 0;
    for (uint32_t other = 0; other < p.top_k; other++) {
      before += picked[other] < picked[choice] || (picked[other] == picked[choice] && other < choice);
    }
    p.own[to + before] = picked[choice];
    ordered[before] = picked[choice];
  }
  __syncwarp();
  if (p.forced) {
    for (uint32_t choice = lane; choice < p.top_k; choice += kWarp) ordered[choice] = p.forced[to + choice];
    __syncwarp();
  }
  const uint32_t* chosen = ordered;
  if (kFault == Fault::kBiasedWeights) {
    for (uint32_t e = lane; e < p.experts; e += kWarp) scores[e] += p.bias[e];
    __syncwarp();
  }
  float sum = 0.0f;
  for (uint32_t choice = 0; choice < p.top_k; choice++) sum += scores[chosen[choice]];
  const float factor = (p.renormalize ? 1.0f / (sum + 1e-20f) : 1.0f) * p.scale;
  for (uint32_t choice = lane; choice < p.top_k; choice += kWarp) {
    p.chosen[entry + choice] = chosen[choice];
    p.weights[entry + choice] = scores[chosen[choice]] * factor;
  }
}

extern "C" __global__ void __launch_bounds__(128) moe_select(const __grid_constant__ MoeSelectParams p) { select(p); }
#ifdef PERIGEE_PLANTED_FAULTS
extern "C" __global__ void __launch_bounds__(128) moe_select_biased_weights(const __grid_constant__ MoeSelectParams p) { select<Fault::kBiasedWeights>(p); }
#endif

// One block. Counts, offsets, tiles and places of all entries. The order within an expert varies from run to run, which no
// result depends on: rows are computed by themselves and summed by token in the order of choices.
extern "C" __global__ void __launch_bounds__(1024) moe_sort(const __grid_constant__ MoeSortParams p) {
  extern __shared__ uint32_t counts[];  // [E] counts, then cursors
  grid_dependency();
  for (uint32_t e = threadIdx.x; e < p.experts; e += blockDim.x) counts[e] = 0;
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < p.entries; i += blockDim.x) {
    if (p.chosen[i] != kNoExpert) atomicAdd(&counts[p.chosen[i]], 1u);
  }
  __syncthreads();
  if (threadIdx.x < kWarp) {
    uint32_t rows_before = 0, tiles_before = 0, touched = 0;
    for (uint32_t base = 0; base < p.experts; base += kWarp) {
      const uint32_t expert = base + threadIdx.x;
      const uint32_t count = expert < p.experts ? counts[expert] : 0;
      const uint32_t tiles = (count + p.tile_rows - 1) / p.tile_rows;
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
      for (uint32_t t = 0; t < tiles; t++) {
        p.tiles[first_tile + t] = {expert, first_row + t * p.tile_rows, min(p.tile_rows, count - t * p.tile_rows)};
      }
      if (expert < p.experts) counts[expert] = first_row;
      rows_before += __shfl_sync(~0u, rows_to, kWarp - 1);
      tiles_before += __shfl_sync(~0u, tiles_to, kWarp - 1);
    }
    if (threadIdx.x == 0) {
      *p.tile_count = tiles_before;
      *p.touched += touched;
    }
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < p.entries; i += blockDim.x) {
    if (p.chosen[i] == kNoExpert) {
      p.position[i] = kNoExpert;
      continue;
    }
    const uint32_t row = atomicAdd(&counts[p.chosen[i]], 1u);
    p.source[row] = i;
    p.position[i] = row;
  }
}

// One block a token: the weighted sum of its experts' rows in the order of choices, on top of the shared experts.
template <class T>
__device__ __forceinline__ void combine(const MoeCombineParams& p) {
  // Sorted rows, then weights, each with room for k rounded up to 8: loads of whole vectors may run ahead.
  extern __shared__ uint4 vectors[];
  grid_dependency();
  uint32_t* choices = reinterpret_cast<uint32_t*>(vectors);
  float* weights = reinterpret_cast<float*>(choices + (p.top_k + 7) / 8 * 8);
  const uint64_t token = blockIdx.x;
  for (uint32_t choice = threadIdx.x; choice < p.top_k; choice += blockDim.x) {
    choices[choice] = p.position[token * p.top_k + choice];
    weights[choice] = p.weights[token * p.top_k + choice];
  }
  __syncthreads();
  // A token that pads the step: nobody looks at what it leaves.
  if (choices[0] == kNoExpert) return;
  const T* rows = static_cast<const T*>(p.rows);
  const T* shared = p.shared ? static_cast<const T*>(p.shared) + token * p.hidden : nullptr;
  T* out = static_cast<T*>(p.out) + token * p.hidden;
  if (p.hidden % 4 == 0) {
    for (uint32_t i = threadIdx.x * 4; i < p.hidden; i += blockDim.x * 4) {
      Quad sum = {};
#pragma unroll 4
      for (uint32_t choice = 0; choice < p.top_k; choice++) {
        const Quad row = read4(rows + static_cast<uint64_t>(choices[choice]) * p.hidden + i);
#pragma unroll
        for (int e = 0; e < 4; e++) sum.x[e] += weights[choice] * row.x[e];
      }
      if (shared) {
        const Quad more = read4(shared + i);
#pragma unroll
        for (int e = 0; e < 4; e++) sum.x[e] += more.x[e];
      }
      write4(out + i, sum);
    }
    return;
  }
  for (uint32_t i = threadIdx.x; i < p.hidden; i += blockDim.x) {
    float sum = 0.0f;
    for (uint32_t choice = 0; choice < p.top_k; choice++) {
      sum += weights[choice] * widen(rows[static_cast<uint64_t>(choices[choice]) * p.hidden + i]);
    }
    if (shared) sum += widen(shared[i]);
    out[i] = narrow<T>(sum);
  }
}

extern "C" __global__ void __launch_bounds__(640) moe_combine_fp32(const __grid_constant__ MoeCombineParams p) { combine<float>(p); }
extern "C" __global__ void __launch_bounds__(640) moe_combine_bf16(const __grid_constant__ MoeCombineParams p) { combine<bf16>(p); }
