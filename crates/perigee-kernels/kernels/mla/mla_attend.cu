// Attention over paged latents for any shape with R + r <= 768, in float32 arithmetic: one warp a (token, head), one key at
// a time with a running maximum. The reference on the device, and the fallback of the tensor-core kernel.
#include "common/common.cuh"
#include "mla/params.h"

constexpr int kSpan = 24;  // channels of a lane: R + r <= 768

template <class T>
__device__ __forceinline__ void attend(const MlaAttendParams& p) {
  const AttendItem item = p.items[blockIdx.x];
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t row = blockIdx.y * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (row >= item.tokens * p.heads) return;
  const uint32_t token = row / p.heads;
  const uint32_t head = row % p.heads;
  const uint32_t width = p.latent + p.rope;
  const uint64_t query_row = static_cast<uint64_t>(item.first_token + token) * p.heads + head;
  const uint32_t last = item.first_position + token;

  float query[kSpan], sum[kSpan];
#pragma unroll
  for (int i = 0; i < kSpan; i++) {
    const uint32_t channel = i * kWarp + lane;
    query[i] = channel < width ? p.queries[query_row * width + channel] : 0.0f;
    sum[i] = 0.0f;
  }
  float peak = -INFINITY, total = 0.0f;
  for (uint32_t r = item.first_range; r < item.first_range + item.ranges; r++) {
    const AttendRange range = p.ranges[r];
    const uint32_t end = min(range.end, last + 1);
    for (uint32_t position = range.start; position < end; position++) {
      const uint32_t page = p.pages[range.pages + position / kPageTokens - range.first_page];
      const T* key = static_cast<const T*>(p.latents) +
                     (static_cast<uint64_t>(page) * kPageTokens + position % kPageTokens) * width;
      float value[kSpan];
      float score = 0.0f;
#pragma unroll
      for (int i = 0; i < kSpan; i++) {
        const uint32_t channel = i * kWarp + lane;
        value[i] = channel < width ? widen(key[channel]) : 0.0f;
        score += query[i] * value[i];
      }
      score = warp_sum(score) * p.scale;
      const float next = fmaxf(peak, score);
      const float old_weight = expf(peak - next);
      const float weight = expf(score - next);
      total = total * old_weight + weight;
#pragma unroll
      for (int i = 0; i < kSpan; i++) sum[i] = sum[i] * old_weight + weight * value[i];
      peak = next;
    }
  }
  const bool direct = item.part == kNoPart;
  const uint64_t part_row = static_cast<uint64_t>(item.part) * p.part_rows + row;
  float* output = direct ? p.output + query_row * p.latent : p.part_output + part_row * p.latent;
  const float factor = total > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
  for (int i = 0; i < kSpan; i++) {
    const uint32_t channel = i * kWarp + lane;
    if (channel < p.latent) output[channel] = sum[i] * factor;
  }
  if (lane == 0) {
    float* lse = direct ? p.lse + query_row : p.part_lse + part_row;
    *lse = total > 0.0f ? peak + logf(total) : -INFINITY;
  }
}

extern "C" __global__ void __launch_bounds__(128) mla_attend_fp32(const __grid_constant__ MlaAttendParams p) { attend<float>(p); }
extern "C" __global__ void __launch_bounds__(128) mla_attend_bf16(const __grid_constant__ MlaAttendParams p) { attend<bf16>(p); }
