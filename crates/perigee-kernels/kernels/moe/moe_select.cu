// Grouped top-k on biased scores, weights from unbiased ones, and the sort of (token, choice) entries by expert that the grouped
// products need. See README.md.
#include "common/common.cuh"
#include "common/faults.cuh"
#include "moe/sort.cuh"

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

// The k largest of `biased` in descending order to `picked`; the lower number wins ties. Minus infinity and not-a-number are never
// picked: where nothing else is left, the number of the choice is.
__device__ __forceinline__ void pick(const float* biased, uint32_t experts, uint32_t top_k, uint32_t* picked) {
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t nothing = sortable(-INFINITY);
  uint32_t keys[kLaneExperts];
#pragma unroll
  for (uint32_t i = 0; i < kLaneExperts; i++) {
    const uint32_t e = lane + i * kWarp;
    keys[i] = e < experts ? sortable(biased[e]) : 0;
  }
  for (uint32_t choice = 0; choice < top_k; choice++) {
    uint32_t best = 0, at = 0;
#pragma unroll
    for (uint32_t i = 0; i < kLaneExperts; i++) {
      if (keys[i] > best) {
        best = keys[i];
        at = i;
      }
    }
    const uint32_t peak = __reduce_max_sync(~0u, best);
    const uint32_t winner = __reduce_min_sync(~0u, best == peak ? lane + at * kWarp : ~0u);
#pragma unroll
    for (uint32_t i = 0; i < kLaneExperts; i++) {
      if (winner == lane + i * kWarp) keys[i] = 0;
    }
    if (lane == 0) picked[choice] = peak > nothing ? winner : choice;
  }
  __syncwarp();
}

// One warp a token; kParts parts of a score are read at a time. Shared memory of a warp: scores [E], biased scores [E], group
// scores [groups], chosen [k], chosen in order [k].
template <Fault kFault, uint32_t kParts>
__device__ __forceinline__ void select(const MoeSelectParams& p, uint32_t token, float* shared) {
  const uint32_t lane = threadIdx.x % kWarp;
  const uint64_t entry = static_cast<uint64_t>(token) * (p.top_k + p.shared);
  // Reads of several experts under way at a time, all that there are where those are few; parts of a score are added in their order.
  const uint64_t part = static_cast<uint64_t>(p.tokens) * p.experts;
  float raw[kLaneExperts], bias[kLaneExperts];
  auto read = [&](uint32_t base) {
    float more[kParts][kLaneExperts];
#pragma unroll
    for (uint32_t j = 0; j < kLaneExperts; j++) {
      bias[j] = base + lane + j * kWarp < p.experts ? p.bias[base + lane + j * kWarp] : 0.0f;
      raw[j] = 0.0f;
    }
    for (uint32_t first = 0; first < p.parts; first += kParts) {
#pragma unroll
      for (uint32_t i = 0; i < kParts; i++) {
        const float* from = p.scores + (first + i) * part + static_cast<uint64_t>(token) * p.experts + base + lane;
#pragma unroll
        for (uint32_t j = 0; j < kLaneExperts; j++) {
          more[i][j] = first + i < p.parts && base + lane + j * kWarp < p.experts ? from[j * kWarp] : 0.0f;
        }
      }
#pragma unroll
      for (uint32_t i = 0; i < kParts; i++) {
#pragma unroll
        for (uint32_t j = 0; j < kLaneExperts; j++) raw[j] += more[i][j];
      }
    }
  };
  read(0);
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
  for (uint32_t base = 0; base < p.experts; base += kWarpExperts) {
    if (base > 0) read(base);
#pragma unroll
    for (uint32_t j = 0; j < kLaneExperts; j++) {
      const uint32_t e = base + lane + j * kWarp;
      if (e < p.experts) {
        scores[e] = sigmoid(raw[j]);
        biased[e] = scores[e] + bias[j];
      }
    }
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
  if (p.experts <= kWarpExperts) {
    pick(biased, p.experts, p.top_k, picked);
  } else {
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

template <Fault kFault>
__device__ __forceinline__ void select_some(const MoeSelectParams& p) {
  extern __shared__ float shared[];
  grid_dependency();
  const uint32_t token = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (token < p.tokens) select<kFault, 18>(p, token, shared);
}

// The whole block. Counts, offsets, tiles and places of all entries. The order within an expert varies from run to run, which no
// result depends on: rows are computed by themselves and summed by token in the order of choices.
__device__ __forceinline__ void sort(const MoeSortParams& p, uint32_t* counts) {
  for (uint32_t e = threadIdx.x; e < p.experts; e += blockDim.x) counts[e] = 0;
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < p.entries; i += blockDim.x) {
    if (p.chosen[i] != kNoExpert) atomicAdd(&counts[p.chosen[i]], 1u);
  }
  __syncthreads();
  if (threadIdx.x < kWarp) place_experts(p, counts);
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

extern "C" __global__ void __launch_bounds__(1024) moe_sort(const __grid_constant__ MoeSortParams p) {
  extern __shared__ uint32_t counts[];
  grid_dependency();
  sort(p, counts);
}

extern "C" __global__ void __launch_bounds__(128) moe_select(const __grid_constant__ MoeSelectParams p) { select_some<Fault::kNone>(p); }
#ifdef PERIGEE_PLANTED_FAULTS
extern "C" __global__ void __launch_bounds__(128) moe_select_biased_weights(const __grid_constant__ MoeSelectParams p) {
  select_some<Fault::kBiasedWeights>(p);
}
#endif
