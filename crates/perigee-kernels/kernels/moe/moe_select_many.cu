// Selection and sort of some dozen tokens in one kernel: a block selects a token's experts, an expert a thread, and the block that comes
// last sorts the entries of all. See README.md.
#include "moe/choose.cuh"

constexpr int kThreads = kWarpExperts;
constexpr uint32_t kMostEntries = 2560;  // k + s of all tokens

extern "C" __global__ void __launch_bounds__(kThreads) moe_select_many(const __grid_constant__ MoeRouteParams p) {
  __shared__ Selecting selecting;
  const uint32_t token = blockIdx.x, expert = threadIdx.x;
  grid_trigger();
  const float bias = expert < p.select.experts ? p.select.bias[expert] : 0.0f;
  const bool is_live = token < *p.select.live;
  grid_wait();
  // Parts of a score are added in their order; a few are under way at a time.
  float raw = 0.0f;
  if (is_live && expert < p.select.experts) {
    const uint64_t part = static_cast<uint64_t>(p.select.tokens) * p.select.experts;
    const float* from = p.select.scores + static_cast<uint64_t>(token) * p.select.experts + expert;
    constexpr uint32_t kAtOnce = 18;
    float parts[kAtOnce];
    for (uint32_t first = 0; first < p.select.parts; first += kAtOnce) {
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; i++) parts[i] = first + i < p.select.parts ? __ldcg(from + (first + i) * part) : 0.0f;
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; i++) raw += parts[i];
    }
  }
  select(p.select, token, is_live, raw, bias, selecting);
  if (is_last(p.arrived, gridDim.x)) sort<kMostEntries>(p.sort);
}
