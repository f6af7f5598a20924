// The weighted sum of a token's experts. See README.md.
#include "common/common.cuh"
#include "moe/params.h"

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
