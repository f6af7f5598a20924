// RMS norm, alone or after adding a delta to the residual stream: one block a row. See README.md.
#include "common/common.cuh"
#include "norm/params.h"

// R is the type of what is normed: the residual stream in float32, or an activation.
template <class R, class T>
__device__ __forceinline__ void rms_norm(const NormParams& p) {
  __shared__ float scratch[kWarp];
  grid_trigger();
  const bool wide = (p.width | p.residual_pitch | p.out_pitch) % 4 == 0;
  // A row of four numbers a thread stays in registers, and its weight is asked for before the kernel ahead has ended.
  const bool kept = wide && p.width <= blockDim.x * 4;
  const uint32_t own = threadIdx.x * 4;
  const bool has_own = kept && own < p.width;
  Quad mine = {}, weight = {};
  if (has_own) weight = read4(p.weight + own);
  grid_wait();
  const uint64_t row = static_cast<uint64_t>(blockIdx.x) * p.residual_pitch;
  const R* residual = static_cast<const R*>(p.residual) + row;
  R* sum = static_cast<R*>(p.sum) + row;
  const T* delta = p.delta ? static_cast<const T*>(p.delta) + static_cast<uint64_t>(blockIdx.x) * p.width : nullptr;
  T* out = static_cast<T*>(p.out) + static_cast<uint64_t>(blockIdx.x) * p.out_pitch;
  float squares = 0.0f;
  if (kept) {
    if (has_own) {
      mine = read4(residual + own);
      if (delta) {
        const Quad d = read4(delta + own);
#pragma unroll
        for (int e = 0; e < 4; e++) mine.x[e] = rounded<R>(mine.x[e] + d.x[e]);
        write4(sum + own, mine);
      }
#pragma unroll
      for (int e = 0; e < 4; e++) squares += mine.x[e] * mine.x[e];
    }
  } else if (wide) {
    for (uint32_t i = threadIdx.x * 4; i < p.width; i += blockDim.x * 4) {
      Quad x = read4(residual + i);
      if (delta) {
        const Quad d = read4(delta + i);
#pragma unroll
        for (int e = 0; e < 4; e++) x.x[e] = rounded<R>(x.x[e] + d.x[e]);
        write4(sum + i, x);
      }
#pragma unroll
      for (int e = 0; e < 4; e++) squares += x.x[e] * x.x[e];
    }
  } else {
    for (uint32_t i = threadIdx.x; i < p.width; i += blockDim.x) {
      float x = widen(residual[i]);
      if (delta) {
        x = rounded<R>(x + widen(delta[i]));
        sum[i] = narrow<R>(x);
      }
      squares += x * x;
    }
  }
  // Each thread reads back below only what it wrote above.
  if (delta) residual = sum;
  const float mean = block_sum(squares, scratch) / static_cast<float>(p.width);
  const float scale = 1.0f / sqrtf(mean + p.eps);
  if (kept) {
    if (has_own) {
#pragma unroll
      for (int e = 0; e < 4; e++) mine.x[e] = mine.x[e] * scale * weight.x[e];
      write4(out + own, mine);
    }
  } else if (wide) {
    for (uint32_t i = threadIdx.x * 4; i < p.width; i += blockDim.x * 4) {
      Quad x = read4(residual + i);
      const Quad w = read4(p.weight + i);
#pragma unroll
      for (int e = 0; e < 4; e++) x.x[e] = x.x[e] * scale * w.x[e];
      write4(out + i, x);
    }
  } else {
    for (uint32_t i = threadIdx.x; i < p.width; i += blockDim.x) {
      out[i] = narrow<T>(widen(residual[i]) * scale * p.weight[i]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(1024) rms_norm_fp32(const __grid_constant__ NormParams p) { rms_norm<float, float>(p); }
extern "C" __global__ void __launch_bounds__(1024) rms_norm_bf16(const __grid_constant__ NormParams p) { rms_norm<bf16, bf16>(p); }
extern "C" __global__ void __launch_bounds__(1024) rms_norm_stream_fp32(const __grid_constant__ NormParams p) { rms_norm<float, float>(p); }
extern "C" __global__ void __launch_bounds__(1024) rms_norm_stream_bf16(const __grid_constant__ NormParams p) { rms_norm<float, bf16>(p); }
