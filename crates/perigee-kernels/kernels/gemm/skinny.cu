// Dense products of up to 8 tokens: out [tokens][rows] = x [tokens][depth] . weight [rows][depth], bfloat16 operands, float32 sums, by
// skinny.cuh. Weights are asked for before the kernel ahead has ended, since nothing writes them. See README.md.
#include "gemm/params.h"
#include "gemm/skinny.cuh"

template <int kTokens, int kRowWarps, int kAhead, class Out>
__device__ __forceinline__ void product(const SkinnyParams& p) {
  extern __shared__ uint4 dynamic[];
  using F = Skinny<kTokens, kRowWarps, 2, kAhead>;
  auto* buffers = reinterpret_cast<typename F::Buffer*>(dynamic);
  grid_trigger();
  // The last block's rows end with the matrix; what it computes twice is the same.
  const uint32_t first = min(blockIdx.x * F::kRows, p.rows - F::kRows);
  const bf16* weight = static_cast<const bf16*>(p.weight) + static_cast<uint64_t>(first) * p.depth;
  F form;
  form.begin(weight, p.depth);
  grid_wait();
  const bf16* in = static_cast<const bf16*>(p.in);
  const uint32_t first_token = blockIdx.y * kTokens;
  Accumulator sum[F::kTiles] = {};
  form.run(buffers, sum, [&](uint32_t i) -> const bf16* {
    return first_token + i < p.tokens ? in + static_cast<uint64_t>(first_token + i) * p.in_pitch : nullptr;
  });
  form.gather(buffers, sum);
  if (F::depth_warp() > 0) return;
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const uint32_t row = first + F::row_warp() * 16 + g;
#pragma unroll
  for (int n = 0; n < F::kTiles; n++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const uint32_t token = first_token + n * 8 + t * 2 + e;
      if (token >= p.tokens) continue;
      Out* to = static_cast<Out*>(p.out) + static_cast<uint64_t>(token) * p.out_pitch + row;
      to[0] = narrow<Out>(sum[n].x[e]);
      to[8] = narrow<Out>(sum[n].x[2 + e]);
    }
  }
}

#define SKINNY(tokens, row_warps, ahead)                                                                                        \
  extern "C" __global__ void __launch_bounds__(kSkinnyThreads, 2) skinny_bf16_##tokens##_##row_warps(const __grid_constant__ SkinnyParams p) { \
    product<tokens, row_warps, ahead, bf16>(p);                                                                                 \
  }                                                                                                                             \
  extern "C" __global__ void __launch_bounds__(kSkinnyThreads, 2) skinny_fp32_##tokens##_##row_warps(const __grid_constant__ SkinnyParams p) { \
    product<tokens, row_warps, ahead, float>(p);                                                                                \
  }                                                                                                                             \
  static_assert(Skinny<tokens, row_warps, 2, ahead>::kShared == 2 * tokens * (64 * ahead * (8 / row_warps) + 32) * 2, "launcher's size");
SKINNY(8, 1, 4)
SKINNY(8, 4, 4)
