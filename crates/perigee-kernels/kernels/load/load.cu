// Weights to their place on the device: stored bytes or the random rule, rounded as stored, converted to the type that the
// products use, rows placed as the op wants them.
#include "common/common.cuh"
#include "load/params.h"

// Finaliser of SplitMix64 (Steele, Lea, Flood 2014); the same integers as perigee_backend::random::mix.
__device__ __forceinline__ uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// Each float operation is one IEEE operation, as on the host: the intrinsics keep the compiler from fusing them.
__device__ __forceinline__ float element(const LoadParams& p, uint64_t index) {
  const uint64_t bits = mix(p.key + index * 0x9e3779b97f4a7c15ull);
  if (p.kind == kUniform) {
    const float unit = __fmul_rn(static_cast<float>(static_cast<uint32_t>(bits >> 40)), 1.0f / 16777216.0f);
    return __fadd_rn(p.a, __fmul_rn(p.b, unit));
  }
  if (p.kind == kNormal) {
    const uint32_t sum = static_cast<uint32_t>(bits & 0xffff) + static_cast<uint32_t>((bits >> 16) & 0xffff) +
                         static_cast<uint32_t>((bits >> 32) & 0xffff) + static_cast<uint32_t>(bits >> 48);
    return __fmul_rn(static_cast<float>(static_cast<int32_t>(sum) - 131070), p.a);
  }
  return p.a;
}

template <class T>
__device__ __forceinline__ void load_rows(const LoadParams& p) {
  const uint64_t total = p.rows * p.columns;
  const uint64_t step = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  for (uint64_t at = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < total; at += step) {
    const uint64_t i = at / p.columns;
    const uint64_t j = at - i * p.columns;
    float value;
    if (p.kind == kBytesBf16) {
      value = widen(static_cast<const bf16*>(p.source)[at]);
    } else if (p.kind == kBytesFp32) {
      value = static_cast<const float*>(p.source)[at];
    } else {
      value = element(p, p.first + i * p.row_stride + j);
      if (p.stored_bf16) value = rounded<bf16>(value);
    }
    const uint64_t row = p.row_offset + i / p.group * p.group_pitch + i % p.group;
    static_cast<T*>(p.destination)[row * p.pitch + j] = narrow<T>(value);
  }
}

extern "C" __global__ void load_rows_fp32(const __grid_constant__ LoadParams p) { load_rows<float>(p); }
extern "C" __global__ void load_rows_bf16(const __grid_constant__ LoadParams p) { load_rows<bf16>(p); }
