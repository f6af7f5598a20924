// What every kernel shares: conversions between storage types and float32, reductions over a warp or a block, and the
// activations of the model in float32. No op lives here.
#pragma once

#include <cuda_bf16.h>
#include <stdint.h>

using bf16 = __nv_bfloat16;

constexpr int kWarp = 32;

// For kernels that `Stream::launch` lets begin before the one ahead of them in the stream has ended. `grid_trigger` lets the next
// kernel begin; what the kernel ahead, or any before it, left in memory may be touched only behind `grid_wait`, and no block may write
// or leave a kernel before it. `grid_dependency` is both, first in a kernel that has nothing to do before the wait.
__device__ __forceinline__ void grid_trigger() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void grid_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void grid_dependency() {
  grid_trigger();
  grid_wait();
}

// Value of a stored element in float32, and the reverse with one rounding.
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) { return x; }
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }

// x as it would be after a trip through storage type T.
template <class T>
__device__ __forceinline__ float rounded(float x) { return widen(narrow<T>(x)); }

// Four elements at once.
struct Quad {
  float x[4];
};

__device__ __forceinline__ Quad read4(const float* p) {
  const float4 v = *reinterpret_cast<const float4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
__device__ __forceinline__ Quad read4(const bf16* p) {
  const uint2 v = *reinterpret_cast<const uint2*>(p);
  const float2 low = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&v.x));
  const float2 high = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&v.y));
  return {{low.x, low.y, high.x, high.y}};
}
__device__ __forceinline__ void write4(float* p, const Quad& q) {
  *reinterpret_cast<float4*>(p) = make_float4(q.x[0], q.x[1], q.x[2], q.x[3]);
}
__device__ __forceinline__ void write4(bf16* p, const Quad& q) {
  uint2 v;
  *reinterpret_cast<__nv_bfloat162*>(&v.x) = __floats2bfloat162_rn(q.x[0], q.x[1]);
  *reinterpret_cast<__nv_bfloat162*>(&v.y) = __floats2bfloat162_rn(q.x[2], q.x[3]);
  *reinterpret_cast<uint2*>(p) = v;
}

// 2^x by the hardware's instruction; results below 2^-126 are 0.
__device__ __forceinline__ float power2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }

// Sigmoid of what is rounded to T next. With bfloat16 by the hardware's 2^x and reciprocal, to a relative 2^-21 where rounding takes
// 2^-9: a sixth of the instructions of the exact exponential and division.
template <class T>
__device__ __forceinline__ float sigmoid_for(float x) { return sigmoid(x); }
template <>
__device__ __forceinline__ float sigmoid_for<bf16>(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + power2(x * -1.4426950408889634f)));
  return y;
}
template <class T>
__device__ __forceinline__ float silu_for(float x) { return x * sigmoid_for<T>(x); }
// ln(1 + e^x); above 20 the reference uses x itself.
__device__ __forceinline__ float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, distance));
  return x;
}

// Sum over the block, the same bits in every thread; blockDim.x is a multiple of 32, up to 1024. `scratch` holds 32 floats
// and may be reused at once: the function ends with a barrier.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
  const int warps = blockDim.x / kWarp;
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  float total = threadIdx.x % kWarp < warps ? scratch[threadIdx.x % kWarp] : 0.0f;
  total = warp_sum(total);
  __syncthreads();
  return total;
}
