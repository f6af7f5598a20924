// Merges disjoint parts of attention by their log-sum-exp: the splits of one item, and a part that was computed elsewhere.
// All in float32; a part with lse = -inf has weight 0 and its output is not read into the sum.
#include "common/common.cuh"
#include "mla/params.h"

// One block a (merge, row): the parts of one (token, head).
extern "C" __global__ void __launch_bounds__(128) mla_merge_splits(const __grid_constant__ MlaAttendParams p) {
  const AttendMerge merge = p.merges[blockIdx.x];
  const uint32_t row = blockIdx.y;
  if (row >= merge.tokens * p.heads) return;
  float peak = -INFINITY;
  for (uint32_t part = 0; part < merge.parts; part++) {
    peak = fmaxf(peak, p.part_lse[static_cast<uint64_t>(merge.first_part + part) * p.part_rows + row]);
  }
  const uint64_t to = (static_cast<uint64_t>(merge.first_token) + row / p.heads) * p.heads + row % p.heads;
  float total = 0.0f;
  for (uint32_t part = 0; part < merge.parts && peak != -INFINITY; part++) {
    total += expf(p.part_lse[static_cast<uint64_t>(merge.first_part + part) * p.part_rows + row] - peak);
  }
  for (uint32_t channel = threadIdx.x; channel < p.latent; channel += blockDim.x) {
    float sum = 0.0f;
    for (uint32_t part = 0; part < merge.parts && peak != -INFINITY; part++) {
      const uint64_t from = static_cast<uint64_t>(merge.first_part + part) * p.part_rows + row;
      const float weight = expf(p.part_lse[from] - peak);
      if (weight > 0.0f) sum += weight * p.part_output[from * p.latent + channel];
    }
    p.output[to * p.latent + channel] = total > 0.0f ? sum / total : 0.0f;
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
