// Merges disjoint parts of attention by their log-sum-exp: the splits of one item, and a part that was computed elsewhere.
// All in float32. Outputs of empty parts are finite and have weight 0.
#include "common/common.cuh"
#include "mla/params.h"

constexpr int kWarps = 8;
constexpr int kLaneChannels = 8;                   // of a lane, kWarp apart
constexpr int kChannels = kLaneChannels * kWarp;   // of a warp

// Parts first, first + step, ... of one (token, head): the weighted sum of some channels, over the sum of the weights of all parts.
struct Merged {
  float sum[kLaneChannels];
  float total, peak;
};

__device__ __forceinline__ Merged merge_parts(const MlaAttendParams& p, const AttendMerge& merge, uint32_t row, uint32_t channel, uint32_t first, uint32_t step) {
  const uint32_t lane = threadIdx.x % kWarp;
  const uint64_t base = static_cast<uint64_t>(merge.first_part) * p.part_rows + row;
  const float* lse = p.part_lse + base;
  const float* output = p.part_output + base * p.latent + channel + lane;
  const uint64_t pitch = static_cast<uint64_t>(p.part_rows) * p.latent;
  Merged merged = {{}, 0.0f, -INFINITY};
  for (uint32_t part = lane; part < merge.parts; part += kWarp) merged.peak = fmaxf(merged.peak, lse[static_cast<uint64_t>(part) * p.part_rows]);
  merged.peak = warp_max(merged.peak);
  // Nothing seen in any part: any finite reference does, and all weights are 0.
  const float reference = merged.peak == -INFINITY ? 0.0f : merged.peak;
  for (uint32_t begin = 0; begin < merge.parts; begin += kWarp) {
    const uint32_t count = min(static_cast<uint32_t>(kWarp), merge.parts - begin);
    const float mine = lane < count ? expf(lse[static_cast<uint64_t>(begin + lane) * p.part_rows] - reference) : 0.0f;
    merged.total += warp_sum(mine);
#pragma unroll 4
    for (uint32_t part = first; part < count; part += step) {
      const float weight = __shfl_sync(~0u, mine, part);
      const float* from = output + (begin + part) * pitch;
#pragma unroll
      for (int i = 0; i < kLaneChannels; i++) {
        if (channel + lane + i * kWarp < p.latent) merged.sum[i] += weight * from[i * kWarp];
      }
    }
  }
  return merged;
}

// Units are (row, kChannels channels) of a merge, blockIdx.x counts merges. With kShared the warps of a block share the parts of one
// unit, else each has a unit of its own.
template <bool kShared>
__device__ __forceinline__ void merge_splits(const MlaAttendParams& p) {
  __shared__ float sums[kShared ? kWarps : 1][kChannels];
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  grid_trigger();
  const AttendMerge merge = p.merges[blockIdx.x];
  grid_wait();
  const uint32_t slices = (p.latent + kChannels - 1) / kChannels;
  const uint32_t unit = kShared ? blockIdx.y : blockIdx.y * kWarps + warp;
  if (unit >= merge.tokens * p.heads * slices) return;
  const uint32_t row = unit / slices, channel = unit % slices * kChannels;
  static_assert(kWarp % kWarps == 0, "a warp's parts are the same in every round");
  Merged merged = merge_parts(p, merge, row, channel, kShared ? warp : 0, kShared ? kWarps : 1);
  if (kShared) {
#pragma unroll
    for (int i = 0; i < kLaneChannels; i++) sums[warp][i * kWarp + lane] = merged.sum[i];
    __syncthreads();
    if (warp > 0) return;
#pragma unroll
    for (int i = 0; i < kLaneChannels; i++) {
      for (int other = 1; other < kWarps; other++) merged.sum[i] += sums[other][i * kWarp + lane];
    }
  }
  const uint64_t to = static_cast<uint64_t>(merge.first_token) * p.heads + row;
#pragma unroll
  for (int i = 0; i < kLaneChannels; i++) {
    const uint32_t at = channel + lane + i * kWarp;
    if (at < p.latent) p.output[to * p.latent + at] = merged.total > 0.0f ? merged.sum[i] / merged.total : 0.0f;
  }
  if (channel == 0 && lane == 0) p.lse[to] = merged.total > 0.0f ? merged.peak + logf(merged.total) : -INFINITY;
}

extern "C" __global__ void __launch_bounds__(kWarps * kWarp) mla_merge_splits(const __grid_constant__ MlaAttendParams p) { merge_splits<false>(p); }
extern "C" __global__ void __launch_bounds__(kWarps * kWarp) mla_merge_many(const __grid_constant__ MlaAttendParams p) { merge_splits<true>(p); }

// As mla_merge_many, for few rows of many parts: a block has 128 channels of a (token, head), so that one token of 32 heads is 128 blocks,
// and asks at once for up to kSpan parts, a lane four channels of each, beside their weights. The latent is a multiple of 128.
constexpr int kHeld = 17;                // parts of a warp under way
constexpr int kSpan = kHeld * kWarps;    // of the block: all of a row that every multiprocessor has a part of
constexpr int kWeights = (kSpan + kWarp - 1) / kWarp;
constexpr int kWideChannels = 4 * kWarp;

extern "C" __global__ void __launch_bounds__(kWarps * kWarp, 2) mla_merge_wide(const __grid_constant__ MlaAttendParams p) {
  __shared__ float4 sums[kWarps][kWarp];
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  grid_trigger();
  const AttendMerge merge = p.merges[blockIdx.x];
  grid_wait();
  const uint32_t slices = p.latent / kWideChannels;
  if (blockIdx.y >= merge.tokens * p.heads * slices) return;
  const uint32_t row = blockIdx.y / slices, channel = blockIdx.y % slices * kWideChannels;
  const uint64_t base = static_cast<uint64_t>(merge.first_part) * p.part_rows + row;
  const uint64_t pitch = static_cast<uint64_t>(p.part_rows) * p.latent;
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
  float total = 0.0f, peak = -INFINITY;
#pragma unroll 1
  for (uint32_t begin = 0; begin < merge.parts; begin += kSpan) {
    const uint32_t count = min(static_cast<uint32_t>(kSpan), merge.parts - begin);
    const float* lse = p.part_lse + base + static_cast<uint64_t>(begin) * p.part_rows;
    const float* output = p.part_output + (base + static_cast<uint64_t>(begin) * p.part_rows) * p.latent + channel + lane * 4;
    float weight[kWeights];
    float4 part[kHeld];
#pragma unroll
    for (int i = 0; i < kWeights; i++) {
      const uint32_t at = lane + i * kWarp;
      weight[i] = at < count ? lse[static_cast<uint64_t>(at) * p.part_rows] : -INFINITY;
    }
#pragma unroll
    for (int j = 0; j < kHeld; j++) {
      const uint32_t at = warp + j * kWarps;
      part[j] = at < count ? *reinterpret_cast<const float4*>(output + at * pitch) : float4{0.0f, 0.0f, 0.0f, 0.0f};
    }
    float next = peak;
#pragma unroll
    for (int i = 0; i < kWeights; i++) next = fmaxf(next, weight[i]);
    next = warp_max(next);
    // Nothing seen in any part: any finite reference does, and all weights are 0.
    const float reference = next == -INFINITY ? 0.0f : next;
    const float fade = expf(peak - reference);
    float mine = 0.0f;
#pragma unroll
    for (int i = 0; i < kWeights; i++) {
      weight[i] = expf(weight[i] - reference);
      mine += weight[i];
    }
    total = total * fade + warp_sum(mine);
    sum = {sum.x * fade, sum.y * fade, sum.z * fade, sum.w * fade};
    peak = next;
    static_assert(kWarp % kWarps == 0, "a warp's parts lie in the same lanes");
#pragma unroll
    for (int j = 0; j < kHeld; j++) {
      const float w = __shfl_sync(~0u, weight[j * kWarps / kWarp], warp + j * kWarps % kWarp);
      sum.x += w * part[j].x;
      sum.y += w * part[j].y;
      sum.z += w * part[j].z;
      sum.w += w * part[j].w;
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (threadIdx.x >= kWideChannels) return;
  float whole = 0.0f;
#pragma unroll
  for (int other = 0; other < kWarps; other++) whole += reinterpret_cast<const float*>(sums[other])[threadIdx.x];
  const uint64_t to = static_cast<uint64_t>(merge.first_token) * p.heads + row;
  p.output[to * p.latent + channel + threadIdx.x] = total > 0.0f ? whole / total : 0.0f;
  if (channel == 0 && threadIdx.x == 0) p.lse[to] = total > 0.0f ? peak + logf(total) : -INFINITY;
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
