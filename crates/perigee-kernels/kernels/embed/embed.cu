// Gathers rows of a matrix: embedding rows of tokens (zero where another rank holds the row) and the rows whose logits are
// wanted. One block a row; bound by bytes.
#include "common/common.cuh"
#include "embed/params.h"

template <class T>
__device__ __forceinline__ void gather(const GatherParams& p) {
  const uint32_t row = p.indices[blockIdx.x] - p.first;  // wraps to a large number below `first`
  const T* from = static_cast<const T*>(p.table) + static_cast<uint64_t>(row) * p.width;
  T* to = static_cast<T*>(p.out) + static_cast<uint64_t>(blockIdx.x) * p.width;
  const bool held = row < p.rows;
  for (uint32_t i = threadIdx.x; i < p.width; i += blockDim.x) to[i] = held ? from[i] : narrow<T>(0.0f);
}

extern "C" __global__ void gather_fp32(const __grid_constant__ GatherParams p) { gather<float>(p); }
extern "C" __global__ void gather_bf16(const __grid_constant__ GatherParams p) { gather<bf16>(p); }
