// Gathers rows of a matrix: embedding rows of tokens (zero where another rank holds the row) and the rows whose logits are
// wanted. One block a row; bound by bytes.
#include "common/common.cuh"
#include "embed/params.h"

template <class T, class Out>
__device__ __forceinline__ void gather(const GatherParams& p) {
  grid_dependency();
  const uint32_t row = p.indices[blockIdx.x] - p.first;  // wraps to a large number below `first`
  const T* from = static_cast<const T*>(p.table) + static_cast<uint64_t>(row) * p.width;
  Out* to = static_cast<Out*>(p.out) + static_cast<uint64_t>(blockIdx.x) * p.width;
  const bool held = row < p.rows;
  for (uint32_t i = threadIdx.x; i < p.width; i += blockDim.x) to[i] = narrow<Out>(held ? widen(from[i]) : 0.0f);
}

extern "C" __global__ void gather_fp32(const __grid_constant__ GatherParams p) { gather<float, float>(p); }
extern "C" __global__ void gather_bf16(const __grid_constant__ GatherParams p) { gather<bf16, bf16>(p); }
extern "C" __global__ void gather_widened_fp32(const __grid_constant__ GatherParams p) { gather<float, float>(p); }
extern "C" __global__ void gather_widened_bf16(const __grid_constant__ GatherParams p) { gather<bf16, float>(p); }
