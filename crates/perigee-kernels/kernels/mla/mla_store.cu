// The step's latents to their pages: the latent after its norm, the shared key as it is; and the queries' "rope" channels,
// which need no absorption, to their place in the absorbed queries. One block a token; bound by bytes.
#include "common/common.cuh"
#include "mla/params.h"

template <class T>
__device__ __forceinline__ void store(const MlaStoreParams& p) {
  __shared__ float scratch[kWarp];
  const uint64_t token = blockIdx.x;
  const T* source = static_cast<const T*>(p.projected) + token * p.pitch + p.kv_offset;
  const uint32_t width = p.latent + p.rope;
  T* page = static_cast<T*>(p.latents) + static_cast<uint64_t>(p.places[token]) * width;
  float squares = 0.0f;
  for (uint32_t i = threadIdx.x; i < p.latent; i += blockDim.x) {
    const float x = widen(source[i]);
    squares += x * x;
  }
  const float mean = block_sum(squares, scratch) / static_cast<float>(p.latent);
  const float scale = 1.0f / sqrtf(mean + p.eps);
  for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) {
    const float x = widen(source[i]);
    page[i] = i < p.latent ? narrow<T>(rounded<T>(x * scale) * p.norm[i]) : narrow<T>(x);
  }
  const T* queries = static_cast<const T*>(p.query_source) + token * p.query_pitch;
  for (uint32_t i = threadIdx.x; i < p.heads * p.rope; i += blockDim.x) {
    const uint32_t head = i / p.rope;
    const uint32_t channel = i - head * p.rope;
    p.queries[(token * p.heads + head) * width + p.latent + channel] =
        widen(queries[head * (p.nope + p.rope) + p.nope + channel]);
  }
}

extern "C" __global__ void __launch_bounds__(256) mla_store_fp32(const __grid_constant__ MlaStoreParams p) { store<float>(p); }
extern "C" __global__ void __launch_bounds__(256) mla_store_bf16(const __grid_constant__ MlaStoreParams p) { store<bf16>(p); }
