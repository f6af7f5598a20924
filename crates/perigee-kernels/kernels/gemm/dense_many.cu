// Dense products of 33 to 128 tokens with Hopper's own matrix instructions: 64 weight rows a warpgroup are the left operand, all tokens
// the right one. A block has some weight rows and a part of the depth; the blocks of a cluster have the same rows and add up through
// each other's shared memory. The first weights are asked for before the kernel ahead has ended. See README.md.
#include "common/hopper.cuh"
#include "gemm/params.h"

constexpr int kDepth = 64;      // of a stage: 128 bytes
constexpr int kBoxRows = 64;    // of weights or tokens

// kGroups warpgroups of 64 weight rows by kTokens tokens.
template <int kGroups, int kTokens, int kStages>
struct alignas(1024) Shared {
  static constexpr int kRows = kGroups * 64;
  static constexpr int kPitch = kRows + 4;
  union {
    struct {
      bf16 weight[kStages][kRows][kDepth];
      bf16 tokens[kStages][kTokens][kDepth];
    };
    float part[kTokens][kPitch];  // once all is multiplied
  };
  uint64_t full[kStages];
  uint64_t empty[kStages];
};

// Four numbers in the same place of another block of the cluster.
__device__ __forceinline__ float4 read_of(const float* place, uint32_t rank) {
  float4 x;
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %4, %5;\nld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(shared_address(place)), "r"(rank)
               : "memory");
  return x;
}

// One thread asks for the block's weights and tokens, weights of the first stages before the kernel ahead has ended.
template <int kGroups, int kTokens, int kStages>
__device__ __forceinline__ void fetch(const DenseManyParams& p, Shared<kGroups, kTokens, kStages>& s, uint32_t first_row, uint32_t begin, uint32_t steps) {
  auto ask_weights = [&](uint32_t step) {
    const uint32_t stage = step % kStages;
    barrier_arrive_expecting(&s.full[stage], sizeof(s.weight[stage]) + sizeof(s.tokens[stage]));
    for (int row = 0; row < kGroups * 64; row += kBoxRows) {
      copy_box(s.weight[stage][row], &p.weight, (begin + step) * kDepth, first_row + row, &s.full[stage]);
    }
  };
  auto ask_tokens = [&](uint32_t step) {
    const uint32_t stage = step % kStages;
    for (int row = 0; row < kTokens; row += kBoxRows) copy_box(s.tokens[stage][row], &p.input, (begin + step) * kDepth, row, &s.full[stage]);
  };
  const uint32_t ahead = min(steps, static_cast<uint32_t>(kStages));
  for (uint32_t step = 0; step < ahead; step++) ask_weights(step);
  grid_wait();
  for (uint32_t step = 0; step < ahead; step++) ask_tokens(step);
  for (uint32_t step = ahead; step < steps; step++) {
    barrier_wait(&s.empty[step % kStages], step / kStages & 1 ^ 1);
    ask_weights(step);
    ask_tokens(step);
  }
}

template <int kGroups, int kTokens, int kStages>
__device__ __forceinline__ void multiply(Shared<kGroups, kTokens, kStages>& s, uint32_t steps) {
  const uint32_t group = threadIdx.x / kWarpgroup, warp = threadIdx.x / kWarp % 4, lane = threadIdx.x % kWarp;
  float sum[kTokens / 2] = {};
  auto add = [&](uint32_t step) {
    const uint32_t stage = step % kStages;
    barrier_wait(&s.full[stage], step / kStages & 1);
    const uint64_t left = operand_by_rows(s.weight[stage][group * 64]), right = operand_by_rows(s.tokens[stage]);
    hold(sum);
    products_begin();
#pragma unroll
    for (int k = 0; k < kDepth / 16; k++) product<kTokens>(sum, left + 2 * k, right + 2 * k);
    products_commit();
  };
  add(0);
  for (uint32_t step = 1; step < steps; step++) {
    add(step);
    products_wait<1>();
    if (lane == 0) barrier_arrive(&s.empty[(step - 1) % kStages]);
  }
  products_wait<0>();
  hold(sum);
  // Every group has read what the sums are written over.
  asm volatile("bar.sync 1, %0;" ::"n"(kGroups * kWarpgroup) : "memory");
  const uint32_t row = group * 64 + warp * 16 + lane / 4;
#pragma unroll
  for (int n = 0; n < kTokens / 8; n++) {
#pragma unroll
    for (int e = 0; e < 4; e++) s.part[n * 8 + lane % 4 * 2 + e % 2][row + e / 2 * 8] = sum[n * 4 + e];
  }
}

template <int kGroups, int kTokens, int kStages>
__device__ __forceinline__ void dense(const DenseManyParams& p) {
  extern __shared__ __align__(1024) uint8_t dynamic[];
  using S = Shared<kGroups, kTokens, kStages>;
  S& s = *reinterpret_cast<S*>(dynamic);
  const uint32_t first_row = blockIdx.x / p.parts * S::kRows, rank = blockIdx.x % p.parts;
  const uint32_t all = p.depth / kDepth, share = (all + p.parts - 1) / p.parts;
  const uint32_t begin = min(rank * share, all), steps = min(share, all - begin);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; stage++) {
      barrier_init(&s.full[stage], 1);
      barrier_init(&s.empty[stage], kGroups * kWarpgroup / kWarp);
    }
    barrier_init_done();
  }
  __syncthreads();
  grid_trigger();
  if (threadIdx.x >= kGroups * kWarpgroup) {
    if (threadIdx.x == kGroups * kWarpgroup) fetch(p, s, first_row, begin, steps);
    __syncwarp();
  } else {
    multiply(s, steps);
  }
  grid_wait();
  cluster_sync();
  // Each block of the cluster adds up the parts of some tokens, in order.
  const uint32_t most = kTokens / p.parts, pieces = S::kRows / 8;
  bf16* out = static_cast<bf16*>(p.out);
  for (uint32_t at = threadIdx.x; at < most * pieces; at += blockDim.x) {
    const uint32_t token = rank * most + at / pieces, row = at % pieces * 8;
    if (token >= p.tokens || first_row + row >= p.rows) continue;
    float sums[8] = {};
    for (uint32_t other = 0; other < p.parts; other++) {
      const float4 a = read_of(&s.part[token][row], other), b = read_of(&s.part[token][row + 4], other);
      const float more[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 8; i++) sums[i] += more[i];
    }
    const uint4 packed = {pack(sums[0], sums[1]), pack(sums[2], sums[3]), pack(sums[4], sums[5]), pack(sums[6], sums[7])};
    *reinterpret_cast<uint4*>(out + static_cast<uint64_t>(token) * p.out_pitch + first_row + row) = packed;
  }
  // The others read this block's part.
  cluster_sync();
}

extern "C" __global__ void __launch_bounds__(kWarpgroup + kWarp, 2) dense_many_64(const __grid_constant__ DenseManyParams p) { dense<1, 64, 6>(p); }
extern "C" __global__ void __launch_bounds__(2 * kWarpgroup + kWarp, 2) dense_many_128(const __grid_constant__ DenseManyParams p) { dense<2, 128, 3>(p); }

// Sizes of the dynamic shared memory, as the launcher computes them.
static_assert(sizeof(Shared<1, 64, 6>) == 6 * (64 + 64) * 128 + 1024, "launcher's size");
static_assert(sizeof(Shared<2, 128, 3>) == 3 * (128 + 128) * 128 + 1024, "launcher's size");
