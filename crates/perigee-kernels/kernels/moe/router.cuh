// The router's scores of few tokens in float32, for which reading the weights is the work: two warps an expert, for kRouterTokens
// tokens. See README.md.
#pragma once
#include "common/common.cuh"
#include "moe/params.h"

constexpr int kRouterTokens = 4;    // tokens of a warp: the weight row is read once for all of them
constexpr int kRouterExperts = 4;   // experts of a block
constexpr int kRouterWarps = 2;     // warps that share an expert
constexpr int kRouterReads = 9;     // 16-byte reads of weights that a thread has under way
constexpr int kRouterThreads = kRouterExperts * kRouterWarps * kWarp;

template <class T, int kTokens = kRouterTokens>
struct RouterFew {
  static constexpr int kStep = kRouterWarps * kWarp * 4;
  uint32_t lane, place, half, expert, first;
  const float* weight;
  bool wide;
  Quad ahead[kRouterReads];

  // Asks for the weights, which nothing writes.
  __device__ __forceinline__ explicit RouterFew(const MoeRouterParams& p) {
    const uint32_t warp = threadIdx.x / kWarp;
    lane = threadIdx.x % kWarp;
    place = warp / kRouterWarps;
    half = warp % kRouterWarps;
    expert = blockIdx.x * kRouterExperts + place;
    first = blockIdx.y * kTokens;
    weight = p.weight + static_cast<uint64_t>(min(expert, p.experts - 1)) * p.hidden;
    wide = p.hidden % 4 == 0;
#pragma unroll
    for (int r = 0; r < kRouterReads; r++) {
      const uint32_t i = (half * kWarp + lane) * 4 + r * kStep;
      ahead[r] = wide && i < p.hidden ? read4(weight + i) : Quad{};
    }
  }

  // The block's token t as it was stored. Rows beyond the last token are read as the last one again, and not written.
  __device__ __forceinline__ const T* token(const MoeRouterParams& p, uint32_t t) const {
    return static_cast<const T*>(p.x) + static_cast<uint64_t>(min(first + t, p.tokens - 1)) * p.hidden;
  }

  // `at(t, i)` is where number i of the block's token t lies.
  template <class At>
  __device__ __forceinline__ void scores(const MoeRouterParams& p, At at) const {
    __shared__ float parts[kRouterExperts][kTokens];
    float sums[kTokens] = {};
    auto add = [&](const Quad& w, uint32_t i) {
#pragma unroll
      for (int t = 0; t < kTokens; t++) {
        const Quad v = read4(at(t, i));
#pragma unroll
        for (int e = 0; e < 4; e++) sums[t] += w.x[e] * v.x[e];
      }
    };
    if (wide) {
#pragma unroll
      for (int r = 0; r < kRouterReads; r++) {
        const uint32_t i = (half * kWarp + lane) * 4 + r * kStep;
        if (i < p.hidden) add(ahead[r], i);
      }
      for (uint32_t i = (half * kWarp + lane) * 4 + kRouterReads * kStep; i < p.hidden; i += kStep) add(read4(weight + i), i);
    } else {
      for (uint32_t i = half * kWarp + lane; i < p.hidden; i += kRouterWarps * kWarp) {
#pragma unroll
        for (int t = 0; t < kTokens; t++) sums[t] += weight[i] * widen(*at(t, i));
      }
    }
#pragma unroll
    for (int t = 0; t < kTokens; t++) {
      sums[t] = warp_sum(sums[t]);
      if (half == 1 && lane == 0) parts[place][t] = sums[t];
    }
    __syncthreads();
    if (half == 0 && lane == 0 && expert < p.experts) {
#pragma unroll
      for (int t = 0; t < kTokens; t++) {
        if (first + t < p.tokens) p.scores[static_cast<uint64_t>(first + t) * p.experts + expert] = sums[t] + parts[place][t];
      }
    }
  }
};
