// Dense products of some dozen tokens whose depth is shared by the blocks of a cluster, which add up through each other's shared memory:
// out [tokens][rows] = x [tokens][depth] . W [rows][depth], 64 tokens by 128 weight rows a cluster, so that the tokens, which every
// cluster reads from the second-level cache, are half of the traffic that the weights are; or by 64. See README.md.
#include "common/hopper.cuh"
#include "common/mma.cuh"
#include "gemm/params.h"

constexpr int kTokens = 64;  // of a block
constexpr int kDepth = 64;  // of a stage
constexpr int kPitch = kDepth + 8;
constexpr int kThreads = 256;  // eight warps, 32 tokens by half of the weight rows each; four of them have the first half of a stage's depth
constexpr int kHalves = 2;

template <int kRows>
struct Stage {
  bf16 tokens[kTokens][kPitch];
  bf16 weights[kRows][kPitch];
};
// Two blocks fit a multiprocessor.
template <int kRows>
union Shared {
  static constexpr int kStages = kRows == 64 ? 6 : 4;
  static constexpr int kSumPitch = kRows + 8;
  Stage<kRows> stages[kStages];
  float sums[kHalves][kTokens][kSumPitch];  // [token][weight row], when the stages are done with
};

// Rows of 64 numbers; rows that there are not are zeros.
template <int kCount>
__device__ __forceinline__ void fetch(bf16 (*to)[kPitch], const bf16* matrix, uint32_t first, uint32_t rows, uint32_t pitch, uint32_t base) {
#pragma unroll
  for (int i = 0; i < kCount * kDepth / 8 / kThreads; i++) {
    const uint32_t at = threadIdx.x + i * kThreads, row = at / (kDepth / 8), channel = at % (kDepth / 8) * 8;
    const bool valid = first + row < rows;
    const bf16* from = matrix + static_cast<uint64_t>(valid ? first + row : 0) * pitch + base + channel;
    copy_async(&to[row][channel], from, valid);
  }
}

// Four numbers of a block of the cluster.
template <int kCluster>
__device__ __forceinline__ float4 read_there(const float* mine, uint32_t rank) {
  if (kCluster == 1) return *reinterpret_cast<const float4*>(mine);
  float4 x;
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %4, %5;\nld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
      : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
      : "r"(shared_address(mine)), "r"(rank)
      : "memory");
  return x;
}

template <int kCluster>
__device__ __forceinline__ void meet() {
  if (kCluster > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
}

// With a cluster of one block, blockIdx.z is one of several products whose tokens, weights and results follow each other: `depth` columns,
// `rows` rows and `rows` columns apart.
template <int kRows, int kCluster, class Out>
__device__ __forceinline__ void joined(const SkinnyParams& p) {
  constexpr int kStages = Shared<kRows>::kStages, kSumPitch = Shared<kRows>::kSumPitch;
  constexpr int kPairs = kRows / 32;  // of 8 weight rows, of a warp
  extern __shared__ uint4 dynamic[];
  Shared<kRows>& s = *reinterpret_cast<Shared<kRows>*>(dynamic);
  const uint32_t which = kCluster == 1 ? blockIdx.z : 0, part = kCluster == 1 ? 0 : blockIdx.z;
  const bf16* x = static_cast<const bf16*>(p.in) + which * p.depth;
  const bf16* weight = static_cast<const bf16*>(p.weight) + static_cast<uint64_t>(which) * p.rows * p.depth;
  Out* result = static_cast<Out*>(p.out) + which * p.rows;
  const uint32_t first_row = blockIdx.x * kRows, first_token = blockIdx.y * kTokens;
  const uint32_t steps = p.depth / kDepth, share = (steps + kCluster - 1) / kCluster;
  const uint32_t begin = min(part * share, steps), end = min(begin + share, steps);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, half = warp / 4;
  const int row = warp % 4 / 2 * 32, column = warp % 2 * (kRows / 2);
  auto fetch_weights = [&](uint32_t step) {
    if (step < end) fetch<kRows>(s.stages[step % kStages].weights, weight, first_row, p.rows, p.depth, step * kDepth);
  };
  auto fetch_tokens = [&](uint32_t step) {
    if (step < end) fetch<kTokens>(s.stages[step % kStages].tokens, x, first_token, p.tokens, p.in_pitch, step * kDepth);
    copy_commit();
  };
  // Nothing writes weights.
#pragma unroll
  for (int ahead = 0; ahead < kStages - 1; ahead++) fetch_weights(begin + ahead);
  grid_dependency();
#pragma unroll
  for (int ahead = 0; ahead < kStages - 1; ahead++) fetch_tokens(begin + ahead);
  Accumulator sum[2][2 * kPairs] = {};
  for (uint32_t step = begin; step < end; step++) {
    copy_wait<kStages - 2>();
    // Also: every warp is done with the stage that is filled next.
    __syncthreads();
    fetch_weights(step + kStages - 1);
    fetch_tokens(step + kStages - 1);
    const Stage<kRows>& stage = s.stages[step % kStages];
#pragma unroll
    for (int i = 0; i < kDepth / kHalves; i += 16) {
      const int base = half * (kDepth / kHalves) + i;
      FragmentA a[2];
      FragmentB b[2 * kPairs];
#pragma unroll
      for (int j = 0; j < 2; j++) a[j] = load_a(&stage.tokens[row + j * 16][base], kPitch, lane);
#pragma unroll
      for (int j = 0; j < kPairs; j++) {
        FragmentB pair[2];
        load_b_pair_transposed(pair, &stage.weights[column + j * 16][base], kPitch, lane);
        b[j * 2] = pair[0];
        b[j * 2 + 1] = pair[1];
      }
#pragma unroll
      for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int n = 0; n < 2 * kPairs; n++) mma(sum[m][n], a[m], b[n]);
      }
    }
  }
  // The groups behind the last step are empty, so nothing is under way.
  __syncthreads();
#pragma unroll
  for (int m = 0; m < 2; m++) {
#pragma unroll
    for (int n = 0; n < 2 * kPairs; n++) {
      float* to = &s.sums[half][row + m * 16 + lane / 4][column + n * 8 + lane % 4 * 2];
      *reinterpret_cast<float2*>(to) = make_float2(sum[m][n].x[0], sum[m][n].x[1]);
      *reinterpret_cast<float2*>(to + 8 * kSumPitch) = make_float2(sum[m][n].x[2], sum[m][n].x[3]);
    }
  }
  meet<kCluster>();
  // Every block adds up and writes some tokens' pieces of four, the parts in the order of the depth.
  constexpr int kPieces = kTokens * kRows / 4;
  for (uint32_t piece = part * kThreads + threadIdx.x; piece < kPieces; piece += kCluster * kThreads) {
    const uint32_t token = piece / (kRows / 4), at = piece % (kRows / 4) * 4;
    float4 parts[kCluster][kHalves];
#pragma unroll
    for (int r = 0; r < kCluster; r++) {
#pragma unroll
      for (int h = 0; h < kHalves; h++) parts[r][h] = read_there<kCluster>(&s.sums[h][token][at], r);
    }
    Quad out = {};
#pragma unroll
    for (int r = 0; r < kCluster; r++) {
#pragma unroll
      for (int h = 0; h < kHalves; h++) {
        out.x[0] += parts[r][h].x;
        out.x[1] += parts[r][h].y;
        out.x[2] += parts[r][h].z;
        out.x[3] += parts[r][h].w;
      }
    }
    if (first_token + token < p.tokens && first_row + at < p.rows) {
      write4(result + static_cast<uint64_t>(first_token + token) * p.out_pitch + first_row + at, out);
    }
  }
  // Nobody leaves while its sums are read.
  if (kCluster > 1) {
    __syncwarp();
    cluster_arrive();
    cluster_wait();
  }
}

#define PERIGEE_JOINED(rows, cluster, suffix, Out)                                                                             \
  extern "C" __global__ void __cluster_dims__(1, 1, cluster) __launch_bounds__(kThreads, 2)                                     \
      joined_##suffix##_##cluster(const __grid_constant__ SkinnyParams p) {                                                     \
    joined<rows, cluster, Out>(p);                                                                                              \
  }
PERIGEE_JOINED(128, 8, bf16, bf16)
PERIGEE_JOINED(128, 4, bf16, bf16)
PERIGEE_JOINED(128, 2, bf16, bf16)
PERIGEE_JOINED(64, 6, fp32, float)

extern "C" __global__ void __launch_bounds__(kThreads, 2) joined_low_fp32(const __grid_constant__ SkinnyParams p) {
  joined<64, 1, float>(p);
}

// Size of the dynamic shared memory, as the launcher computes it.
static_assert(sizeof(Shared<64>) == 6 * (64 + 64) * 72 * 2 && sizeof(Shared<128>) == 4 * (64 + 128) * 72 * 2, "launcher's sizes");
