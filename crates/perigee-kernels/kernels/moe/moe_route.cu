// Router, selection and sort of a few tokens in one kernel, and ahead of them the norm of the residual stream: every block norms its
// tokens for itself. Of the blocks with the same tokens the one whose scores come last selects, and of these the last sorts. See README.md.
#include "moe/router.cuh"
#include "norm/normed.cuh"
#include "moe/choose.cuh"

constexpr uint32_t kMostEntries = 512;            // k + s of all tokens
static_assert(kRouterThreads == kNormedThreads, "the same blocks");
static_assert(kRouterThreads == kWarpExperts, "a thread an expert");

// What the norm leaves no block waits for, so it is written behind the arrival.
template <class T, bool kNorm, int kTokens = kRouterTokens>
__device__ __forceinline__ void route(const MoeRouteParams& p) {
  __shared__ alignas(16) T normed[kNorm ? kTokens : 1][kMostNormed];
  __shared__ Selecting selecting;
  // What nothing in the step writes is asked for before the wait. The product behind asks for weights of its own, so it begins only
  // when this kernel has read what it waited for.
  RouterFew<T, kTokens> few(p.router);
  Normed<T, kTokens> norm;
  if (kNorm) norm.begin(p.norm);
  const float bias = threadIdx.x < p.select.experts ? p.select.bias[threadIdx.x] : 0.0f;
  const uint32_t live = *p.select.live;
  grid_wait();
  const uint32_t end = min(few.first + kTokens, p.router.tokens);
  // Where the stream's sum goes to another place, any block may write it at once.
  const bool is_moved = p.norm.sum != p.norm.residual;
  auto write_normed = [&] {
    if (blockIdx.x == 0) norm.store(p.norm, few.first, end - few.first, normed);
    if (is_moved) add_to_stream<T>(p.norm, few.first, end, blockIdx.x * kRouterThreads + threadIdx.x, gridDim.x * kRouterThreads);
  };
  if constexpr (kNorm) {
    norm.run(p.norm, few.first, end - few.first, normed);
    grid_trigger();
    few.scores(p.router, [&](uint32_t t, uint32_t i) { return &normed[few.first + t < p.router.tokens ? t : 0][i]; });
  } else {
    few.scores(p.router, [&](uint32_t t, uint32_t i) { return few.token(p.router, t) + i; });
    grid_trigger();
  }
  if (!is_last(p.arrived + 1 + blockIdx.y, gridDim.x)) {
    if (kNorm) write_normed();
    return;
  }
  for (uint32_t token = few.first; token < end; token++) {
    const bool is_scored = token < live && threadIdx.x < p.select.experts;
    const float raw = is_scored ? __ldcg(p.select.scores + static_cast<uint64_t>(token) * p.select.experts + threadIdx.x) : 0.0f;
    select(p.select, token, token < live, raw, bias, selecting);
    __syncthreads();
  }
  if (kNorm) write_normed();
  // Every block with these tokens has read the residual stream.
  if (kNorm && !is_moved) add_to_stream<T>(p.norm, few.first, end, threadIdx.x, kRouterThreads);
  if (p.sort.entries == 0) {
    // One token, whose products need no order.
    if (threadIdx.x == 0 && live > 0) *p.sort.touched += p.select.top_k;
  } else if (is_last(p.arrived, gridDim.y)) {
    sort<kMostEntries>(p.sort);
  }
}

extern "C" __global__ void __launch_bounds__(kRouterThreads, 2) moe_route_fp32(const __grid_constant__ MoeRouteParams p) { route<float, false>(p); }
extern "C" __global__ void __launch_bounds__(kRouterThreads, 2) moe_route_bf16(const __grid_constant__ MoeRouteParams p) { route<bf16, false>(p); }
// For one token: nothing is computed for three more.
extern "C" __global__ void __launch_bounds__(kRouterThreads, 1) moe_norm_route_bf16(const __grid_constant__ MoeRouteParams p) { route<bf16, true, 1>(p); }
