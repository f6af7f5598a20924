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

// The same, then what a norm of the residual stream does with it, in one kernel: rows of up to four numbers a thread. What would have
// been stored in between is rounded as if it had been.
template <class T>
__device__ __forceinline__ void combine_norm(const MoeCombineNormParams& both) {
  extern __shared__ uint4 vectors[];
  __shared__ float scratch[kWarp];
  const MoeCombineParams& p = both.combine;
  const NormParams& norm = both.norm;
  grid_trigger();
  const uint64_t token = blockIdx.x;
  const uint32_t own = threadIdx.x * 4;
  const bool has_own = own < p.hidden;
  Quad weight = {};
  if (has_own) weight = read4(norm.weight + own);
  grid_wait();
  uint32_t* choices = reinterpret_cast<uint32_t*>(vectors);
  float* weights = reinterpret_cast<float*>(choices + (p.top_k + 7) / 8 * 8);
  const float* residual = static_cast<const float*>(norm.residual) + token * norm.residual_pitch;
  Quad x = {};
  if (has_own) x = read4(residual + own);
  for (uint32_t choice = threadIdx.x; choice < p.top_k; choice += blockDim.x) {
    choices[choice] = p.position[token * p.top_k + choice];
    weights[choice] = p.weights[token * p.top_k + choice];
  }
  __syncthreads();
  // A token that pads the step: nobody looks at what it leaves.
  if (choices[0] == kNoExpert) return;
  float squares = 0.0f;
  if (has_own) {
    const T* rows = static_cast<const T*>(p.rows);
    Quad sum = {};
#pragma unroll 9
    for (uint32_t choice = 0; choice < p.top_k; choice++) {
      const Quad row = read4(rows + static_cast<uint64_t>(choices[choice]) * p.hidden + own);
#pragma unroll
      for (int e = 0; e < 4; e++) sum.x[e] += weights[choice] * row.x[e];
    }
    if (p.shared) {
      const Quad more = read4(static_cast<const T*>(p.shared) + token * p.hidden + own);
#pragma unroll
      for (int e = 0; e < 4; e++) sum.x[e] += more.x[e];
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
      x.x[e] += rounded<T>(sum.x[e]);
      squares += x.x[e] * x.x[e];
    }
    write4(static_cast<float*>(norm.sum) + token * norm.residual_pitch + own, x);
  }
  const float mean = block_sum(squares, scratch) / static_cast<float>(norm.width);
  const float scale = 1.0f / sqrtf(mean + norm.eps);
  if (has_own) {
#pragma unroll
    for (int e = 0; e < 4; e++) x.x[e] = x.x[e] * scale * weight.x[e];
    write4(static_cast<T*>(norm.out) + token * norm.out_pitch + own, x);
  }
}

extern "C" __global__ void __launch_bounds__(640) moe_combine_norm_fp32(const __grid_constant__ MoeCombineNormParams p) { combine_norm<float>(p); }
extern "C" __global__ void __launch_bounds__(640) moe_combine_norm_bf16(const __grid_constant__ MoeCombineNormParams p) { combine_norm<bf16>(p); }
