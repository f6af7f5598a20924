// Element-wise companions of dense products: float32 partial sums to the type that the next product reads, and the gated
// activation of an MLP. Bound by bytes.
#include "common/common.cuh"
#include "gemm/params.h"

constexpr uint32_t kVector = 8;  // numbers of a thread at a time, where all of them divide so

template <class T>
__device__ __forceinline__ void convert(const ElementParams& p) {
  grid_dependency();
  const uint64_t step = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  const uint64_t first = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const float* in = static_cast<const float*>(p.in);
  T* out = static_cast<T*>(p.out);
  if (p.count % kVector == 0) {
    for (uint64_t i = first * kVector; i < p.count; i += step * kVector) {
      const Quad low = read4(in + i), high = read4(in + i + 4);
      write4(out + i, low);
      write4(out + i + 4, high);
    }
    return;
  }
  for (uint64_t i = first; i < p.count; i += step) out[i] = narrow<T>(in[i]);
}

// Where the gate of an element of the result lies, and its up from there.
struct Pair {
  uint64_t gate;
  uint32_t up;
};
__device__ __forceinline__ Pair pair_of(const ElementParams& p, uint64_t i) {
  const uint64_t row = i / p.width;
  const uint32_t column = static_cast<uint32_t>(i - row * p.width);
  const uint32_t at = p.block ? column / p.block * 2 * p.block + column % p.block : column;
  return {row * 2 * p.width + at, p.block ? p.block : p.width};
}

template <class T>
__device__ __forceinline__ void silu_mul(const ElementParams& p) {
  grid_dependency();
  const uint64_t step = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  const uint64_t thread = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const T* in = static_cast<const T*>(p.in);
  T* out = static_cast<T*>(p.out);
  if (p.width % 8 == 0 && p.block % 8 == 0) {
    for (uint64_t i = thread * 8; i < p.count; i += step * 8) {
      const Pair pair = pair_of(p, i);
      const T* gate = in + pair.gate;
      Quad g[2], u[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        g[half] = read4(gate + half * 4);
        u[half] = read4(gate + pair.up + half * 4);
      }
#pragma unroll
      for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int e = 0; e < 4; e++) u[half].x[e] *= silu_for<T>(g[half].x[e]);
        write4(out + i + half * 4, u[half]);
      }
    }
    return;
  }
  for (uint64_t i = thread; i < p.count; i += step) {
    const Pair pair = pair_of(p, i);
    out[i] = narrow<T>(silu_for<T>(widen(in[pair.gate])) * widen(in[pair.gate + pair.up]));
  }
}

extern "C" __global__ void __launch_bounds__(256) convert_bf16(const __grid_constant__ ElementParams p) { convert<bf16>(p); }
extern "C" __global__ void __launch_bounds__(256) silu_mul_fp32(const __grid_constant__ ElementParams p) { silu_mul<float>(p); }
extern "C" __global__ void __launch_bounds__(256) silu_mul_bf16(const __grid_constant__ ElementParams p) { silu_mul<bf16>(p); }
