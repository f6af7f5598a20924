// The norm of the residual stream and the router's scores of its result, in one kernel: 32 tokens by 64 experts a cluster, whose blocks
// share the columns, and so the squares of a row and the products of a score. See README.md.
#include "common/hopper.cuh"
#include "common/mma.cuh"
#include "moe/params.h"

constexpr int kTokens = 32;
constexpr int kExperts = 64;
constexpr int kCluster = 6;
constexpr int kColumns = 384;  // of a block, at most
constexpr int kPitch = kColumns + 8;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRows = kTokens / kWarps;             // of a warp that norms
constexpr int kPieces = kColumns / (4 * kWarp);     // of a row, four numbers a lane
constexpr int kHalves = 2;                          // of the columns, by four warps each
constexpr int kSumPitch = kExperts + 8;

struct Shared {
  union {
    bf16 tokens[kTokens][kPitch];
    float sums[kHalves][kTokens][kSumPitch];  // [token][expert], when the tokens are done with
  };
  bf16 experts[kExperts][kPitch];
};

extern "C" __global__ void __cluster_dims__(1, 1, kCluster) __launch_bounds__(kThreads, 1)
    moe_norm_router(const __grid_constant__ MoeRouteParams both) {
  extern __shared__ uint4 dynamic[];
  __shared__ float squares[kTokens];
  Shared& s = *reinterpret_cast<Shared*>(dynamic);
  const MoeRouterParams& p = both.router;
  const NormParams& norm = both.norm;
  const uint32_t first_expert = blockIdx.x * kExperts, first_token = blockIdx.y * kTokens, part = blockIdx.z;
  const uint32_t share = (p.hidden / 64 + kCluster - 1) / kCluster * 64;
  const uint32_t begin = min(part * share, p.hidden), columns = min(share, p.hidden - begin);
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  // Nothing writes weights.
  for (uint32_t i = threadIdx.x; i < kExperts * (kColumns / 8); i += kThreads) {
    const uint32_t row = i / (kColumns / 8), column = i % (kColumns / 8) * 8;
    const bool valid = first_expert + row < p.experts && column < columns;
    const bf16* from = reinterpret_cast<const bf16*>(p.weight) + (valid ? static_cast<uint64_t>(first_expert + row) * p.hidden + begin + column : 0);
    copy_async(&s.experts[row][column], from, valid);
  }
  copy_commit();
  Quad weight[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; i++) {
    const uint32_t column = i * 4 * kWarp + lane * 4;
    weight[i] = column < columns ? read4(norm.weight + begin + column) : Quad{};
  }
  grid_dependency();

  Quad x[kRows][kPieces];
  Quad delta[kRows][kPieces];
#pragma unroll
  for (int t = 0; t < kRows; t++) {
    const uint32_t token = first_token + warp * kRows + t;
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      const uint32_t column = i * 4 * kWarp + lane * 4;
      const bool valid = token < p.tokens && column < columns;
      const float* from = static_cast<const float*>(norm.residual) + static_cast<uint64_t>(token) * norm.residual_pitch + begin + column;
      x[t][i] = valid ? read4(from) : Quad{};
      delta[t][i] = valid ? read4(static_cast<const bf16*>(norm.delta) + static_cast<uint64_t>(token) * norm.width + begin + column) : Quad{};
    }
  }
#pragma unroll
  for (int t = 0; t < kRows; t++) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        x[t][i].x[e] += delta[t][i].x[e];
        sum += x[t][i].x[e] * x[t][i].x[e];
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) squares[warp * kRows + t] = sum;
  }
  cluster_sync();
  Quad normed[kRows][kPieces];
#pragma unroll
  for (int t = 0; t < kRows; t++) {
    const uint32_t row = warp * kRows + t;
    float sum = 0.0f;
#pragma unroll
    for (int r = 0; r < kCluster; r++) sum += load_at(address_at(&squares[row], r));
    const float scale = 1.0f / sqrtf(sum / static_cast<float>(norm.width) + norm.eps);
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      const uint32_t column = i * 4 * kWarp + lane * 4;
#pragma unroll
      for (int e = 0; e < 4; e++) normed[t][i].x[e] = x[t][i].x[e] * scale * weight[i].x[e];
      // Beyond the columns are zeros.
      write4(&s.tokens[row][column], normed[t][i]);
    }
  }
  copy_wait<0>();
  __syncthreads();

  // A warp: 16 tokens, 32 experts, half of the columns.
  const uint32_t half = warp / 4, row = warp % 4 / 2 * 16, first = warp % 2 * 32;
  Accumulator sum[4] = {};
#pragma unroll 4
  for (uint32_t base = half * (kColumns / kHalves); base < (half + 1) * (kColumns / kHalves); base += 16) {
    const FragmentA a = load_a(&s.tokens[row][base], kPitch, lane);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      FragmentB pair[2];
      load_b_pair_transposed(pair, &s.experts[first + i * 16][base], kPitch, lane);
      mma(sum[i * 2], a, pair[0]);
      mma(sum[i * 2 + 1], a, pair[1]);
    }
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < 4; n++) {
    float* to = &s.sums[half][row + lane / 4][first + n * 8 + lane % 4 * 2];
    *reinterpret_cast<float2*>(to) = make_float2(sum[n].x[0], sum[n].x[1]);
    *reinterpret_cast<float2*>(to + 8 * kSumPitch) = make_float2(sum[n].x[2], sum[n].x[3]);
  }
  cluster_sync();
  // Pieces of four scores, the parts in the order of the columns.
  const uint32_t piece = part * kThreads + threadIdx.x;
  if (piece < kTokens * kExperts / 4) {
    const uint32_t token = piece / (kExperts / 4), at = piece % (kExperts / 4) * 4;
    float4 parts[kCluster][kHalves];
#pragma unroll
    for (int r = 0; r < kCluster; r++) {
#pragma unroll
      for (int h = 0; h < kHalves; h++) parts[r][h] = load4_at(address_at(&s.sums[h][token][at], r));
    }
    Quad score = {};
#pragma unroll
    for (int r = 0; r < kCluster; r++) {
#pragma unroll
      for (int h = 0; h < kHalves; h++) {
        score.x[0] += parts[r][h].x;
        score.x[1] += parts[r][h].y;
        score.x[2] += parts[r][h].z;
        score.x[3] += parts[r][h].w;
      }
    }
    if (first_token + token < p.tokens && first_expert + at < p.experts) {
      write4(p.scores + static_cast<uint64_t>(first_token + token) * p.experts + first_expert + at, score);
    }
  }
  // Nobody leaves while its sums are read.
  __syncwarp();
  cluster_arrive();
  // The clusters of the first experts leave the sum and the result, here, since a barrier that publishes waits for what is being
  // written. Others may still read the stream: the sum lies elsewhere.
#pragma unroll
  for (int t = 0; t < kRows; t++) {
    const uint32_t token = first_token + warp * kRows + t;
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      const uint32_t column = i * 4 * kWarp + lane * 4;
      if (blockIdx.x > 0 || token >= p.tokens || column >= columns) continue;
      write4(static_cast<float*>(norm.sum) + static_cast<uint64_t>(token) * norm.residual_pitch + begin + column, x[t][i]);
      write4(static_cast<bf16*>(norm.out) + static_cast<uint64_t>(token) * norm.out_pitch + begin + column, normed[t][i]);
    }
  }
  __syncwarp();
  cluster_wait();
}

// Size of the dynamic shared memory, as the launcher computes it.
static_assert(sizeof(Shared) == (32 + 64) * 392 * 2, "launcher's size");
