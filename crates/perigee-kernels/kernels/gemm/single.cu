// Dense products of one token: out [rows] = weight [rows][depth] . x [depth], bfloat16 operands, float32 sums, by single.cuh. A warp in
// as many as there are in the grid has every row. Weights are asked for before the kernel ahead has ended, since nothing writes them.
#include "gemm/params.h"
#include "gemm/single.cuh"
#include "norm/normed.cuh"

template <int kPieces, class Out, class Read>
__device__ __forceinline__ void product(const SkinnyParams& p, Read read_token) {
  extern __shared__ uint4 memory[];
  __shared__ alignas(8) uint64_t barriers[kSingleWarps][kSingleStages];
  const uint32_t lane = threadIdx.x % kWarp;
  // Warps of one place in their blocks have rows side by side.
  const uint32_t first = threadIdx.x / kWarp * gridDim.x + blockIdx.x, step = kSingleWarps * gridDim.x;
  const bf16* weight = static_cast<const bf16*>(p.weight);
  SingleRing ring(memory, barriers, p.stages, p.depth);
  uint32_t ahead = first;
  for (uint32_t i = 0; i < p.stages; i++, ahead += step) {
    if (ahead < p.rows && lane == 0) ring.ask(weight + static_cast<uint64_t>(ahead) * p.depth);
  }
  grid_wait();
  SingleToken<kPieces> token;
  read_token(token);
  // The kernel behind asks for its own weights at once: it begins when nothing is left to be asked for here.
  bool has_triggered = false;
  for (uint32_t row = first; row < p.rows; row += step, ahead += step) {
    if (!has_triggered && ahead >= p.rows) {
      grid_trigger();
      has_triggered = true;
    }
    const float sum = token.product(ring.wait());
    ring.next();
    if (lane == 0) {
      if (ahead < p.rows) ring.ask(weight + static_cast<uint64_t>(ahead) * p.depth);
      static_cast<Out*>(p.out)[row] = narrow<Out>(sum);
    }
  }
}

template <int kPieces, class Out>
__device__ __forceinline__ void plain(const SkinnyParams& p) {
  product<kPieces, Out>(p, [&](SingleToken<kPieces>& token) { token.read(static_cast<const bf16*>(p.in), p.depth); });
}

// The residual stream's sum goes to another place: blocks may still have to read it.
template <int kPieces>
__device__ __forceinline__ void after_norm(const NormedProductParams& p) {
  __shared__ alignas(16) bf16 normed[1][kMostNormed];
  static_assert(kSingleThreads == kNormedThreads && kPieces * 256 <= kMostNormed, "the block that norms");
  Normed<bf16, 1> norm;
  norm.begin(p.norm);
  product<kPieces, bf16>(p.product, [&](SingleToken<kPieces>& token) {
    norm.run(p.norm, 0, 1, normed);
    token.read(normed[0], p.product.depth);
    if (blockIdx.x == gridDim.x - 1) norm.store(p.norm, 0, 1, normed);
    add_to_stream<bf16>(p.norm, 0, 1, blockIdx.x * kSingleThreads + threadIdx.x, gridDim.x * kSingleThreads);
  });
}

extern "C" __global__ void __launch_bounds__(kSingleThreads, 2) single_bf16_9(const __grid_constant__ SkinnyParams p) { plain<9, bf16>(p); }
extern "C" __global__ void __launch_bounds__(kSingleThreads, 2) single_fp32_9(const __grid_constant__ SkinnyParams p) { plain<9, float>(p); }
extern "C" __global__ void __launch_bounds__(kSingleThreads, 1) single_bf16_16(const __grid_constant__ SkinnyParams p) { plain<16, bf16>(p); }
extern "C" __global__ void __launch_bounds__(kSingleThreads, 2) single_normed_9(const __grid_constant__ NormedProductParams p) { after_norm<9>(p); }
