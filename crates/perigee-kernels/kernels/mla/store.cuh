// A token's latent to its page.
#pragma once
#include "common/common.cuh"
#include "mla/params.h"

// The whole block: the latent after its norm, then the shared key, of which `rope(x, at)` is channel `at`. `scratch` is of `block_sum`.
template <class T, class Rope>
__device__ __forceinline__ void store_latent(const MlaStoreParams& p, uint64_t token, float* scratch, Rope rope) {
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
    page[i] = i < p.latent ? narrow<T>(widen(source[i]) * scale * p.norm[i]) : narrow<T>(rope(source + p.latent, i - p.latent));
  }
}
