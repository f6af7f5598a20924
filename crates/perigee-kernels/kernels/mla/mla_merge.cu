// Merges disjoint parts of attention by their log-sum-exp: the splits of one item, and a part that was computed elsewhere.
// All in float32. Outputs of empty parts are finite and have weight 0.
#include "common/common.cuh"
#include "mla/params.h"

constexpr int kThreads = 512;
constexpr int kGroupThreads = 128;                 // threads that share a part
constexpr int kGroups = kThreads / kGroupThreads;  // parts read at a time
constexpr int kSpan = 6;                           // channels of a thread: R <= 768
constexpr int kBatch = 512;                        // parts whose weights are kept at a time

// One block a (merge, row): the parts of one (token, head).
extern "C" __global__ void __launch_bounds__(kThreads) mla_merge_splits(const __grid_constant__ MlaAttendParams p) {
  __shared__ float weights[kBatch];
  __shared__ float scratch[kWarp];
  __shared__ float sums[kGroups - 1][kSpan * kGroupThreads];
  grid_dependency();
  const AttendMerge merge = p.merges[blockIdx.x];
  const uint32_t row = blockIdx.y;
  if (row >= merge.tokens * p.heads) return;
  const float* lse = p.part_lse + static_cast<uint64_t>(merge.first_part) * p.part_rows + row;
  float peak = -INFINITY;
  for (uint32_t part = threadIdx.x; part < merge.parts; part += kThreads) peak = fmaxf(peak, lse[static_cast<uint64_t>(part) * p.part_rows]);
  peak = warp_max(peak);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = peak;
  __syncthreads();
  peak = warp_max(threadIdx.x % kWarp < kThreads / kWarp ? scratch[threadIdx.x % kWarp] : -INFINITY);
  __syncthreads();
  // Nothing seen in any part: any finite reference does, and all weights are 0.
  const float reference = peak == -INFINITY ? 0.0f : peak;

  const uint32_t group = threadIdx.x / kGroupThreads, lane = threadIdx.x % kGroupThreads;
  float sum[kSpan] = {};
  float total = 0.0f;
  for (uint32_t first = 0; first < merge.parts; first += kBatch) {
    const uint32_t count = min(static_cast<uint32_t>(kBatch), merge.parts - first);
    for (uint32_t part = threadIdx.x; part < count; part += kThreads) {
      weights[part] = expf(lse[static_cast<uint64_t>(first + part) * p.part_rows] - reference);
      total += weights[part];
    }
    __syncthreads();
#pragma unroll 4
    for (uint32_t part = group; part < count; part += kGroups) {
      const float weight = weights[part];
      const float* from = p.part_output + (static_cast<uint64_t>(merge.first_part + first + part) * p.part_rows + row) * p.latent;
#pragma unroll
      for (int i = 0; i < kSpan; i++) {
        const uint32_t channel = i * kGroupThreads + lane;
        if (channel < p.latent) sum[i] += weight * from[channel];
      }
    }
    __syncthreads();
  }
  total = block_sum(total, scratch);
#pragma unroll
  for (int i = 0; i < kSpan; i++) {
    if (group > 0) sums[group - 1][i * kGroupThreads + lane] = sum[i];
  }
  __syncthreads();
  const uint64_t to = static_cast<uint64_t>(merge.first_token) * p.heads + row;
  if (group == 0) {
#pragma unroll
    for (int i = 0; i < kSpan; i++) {
      const uint32_t channel = i * kGroupThreads + lane;
      for (int other = 0; other < kGroups - 1; other++) sum[i] += sums[other][channel];
      if (channel < p.latent) p.output[to * p.latent + channel] = total > 0.0f ? sum[i] / total : 0.0f;
    }
  }
  if (threadIdx.x == 0) p.lse[to] = total > 0.0f ? peak + logf(total) : -INFINITY;
}

// One block a head: merges another part into the partial result of one token.
extern "C" __global__ void __launch_bounds__(128) mla_merge_other(const __grid_constant__ MlaMergeParams p) {
  const uint64_t head = blockIdx.x;
  const float mine = p.lse[head];
  const float other = p.other_lse[head];
  const float peak = fmaxf(mine, other);
  // All threads have read the lse before one of them writes it.
  __syncthreads();
  if (peak == -INFINITY) return;
  const float my_weight = expf(mine - peak);
  const float other_weight = expf(other - peak);
  const float total = my_weight + other_weight;
  for (uint32_t channel = threadIdx.x; channel < p.latent; channel += blockDim.x) {
    const uint64_t at = head * p.latent + channel;
    float sum = 0.0f;
    if (my_weight > 0.0f) sum += my_weight * p.output[at];
    if (other_weight > 0.0f) sum += other_weight * p.other_output[at];
    p.output[at] = sum / total;
  }
  if (threadIdx.x == 0) p.lse[head] = peak + logf(total);
}
