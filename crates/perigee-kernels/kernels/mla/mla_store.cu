// The step's latents to their pages: the latent after its norm, the shared key as it is; and the queries' "rope" channels,
// which need no absorption, to their place in the absorbed queries. One block a token; bound by bytes.
#include "common/common.cuh"
#include "common/faults.cuh"
#include "mla/store.cuh"

// Channel `at` of `x`, a token's `rope` channels that were to stay as they are. The mistake rotates neighbouring pairs by the
// token's position, which its launcher appends to the places.
template <class T, Fault kFault>
__device__ __forceinline__ float positioned(const MlaStoreParams& p, const T* x, uint32_t at) {
  if (kFault != Fault::kRotary) return widen(x[at]);
  const float position = static_cast<float>(p.places[gridDim.x + blockIdx.x]);
  const uint32_t even = at & ~1u;
  float sin, cos;
  sincospif(position * powf(10000.0f, -static_cast<float>(even) / static_cast<float>(p.rope)) * 0.318309886f, &sin, &cos);
  const float a = widen(x[even]), b = widen(x[even + 1]);
  return at == even ? a * cos - b * sin : a * sin + b * cos;
}

template <class T, Fault kFault = Fault::kNone>
__device__ __forceinline__ void store(const MlaStoreParams& p) {
  __shared__ float scratch[kWarp];
  grid_dependency();
  const uint64_t token = blockIdx.x;
  if (p.places[token] == kNoPlace) return;
  const uint32_t width = p.latent + p.rope;
  store_latent<T>(p, token, scratch, [&](const T* x, uint32_t at) { return positioned<T, kFault>(p, x, at); });
  const T* queries = static_cast<const T*>(p.query_source) + token * p.query_pitch;
  for (uint32_t i = threadIdx.x; i < p.heads * p.rope; i += blockDim.x) {
    const uint32_t head = i / p.rope;
    const uint32_t channel = i - head * p.rope;
    p.queries[(token * p.heads + head) * width + p.latent + channel] =
        positioned<T, kFault>(p, queries + head * (p.nope + p.rope) + p.nope, channel);
  }
}

extern "C" __global__ void __launch_bounds__(256) mla_store_fp32(const __grid_constant__ MlaStoreParams p) { store<float>(p); }
extern "C" __global__ void __launch_bounds__(256) mla_store_bf16(const __grid_constant__ MlaStoreParams p) { store<bf16>(p); }

#ifdef PERIGEE_PLANTED_FAULTS
extern "C" __global__ void __launch_bounds__(256) mla_store_fp32_rotary(const __grid_constant__ MlaStoreParams p) { store<float, Fault::kRotary>(p); }
#endif
