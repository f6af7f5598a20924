// Dense products of 33 to 64 tokens with Hopper's own matrix instructions: 64 weight rows are the left operand, all tokens the right
// one. A block has a part of the depth; the blocks of a cluster have the same rows and add up through each other's shared memory. The
// first weights are asked for before the kernel ahead has ended. See README.md.
#include "common/hopper.cuh"
#include "gemm/params.h"

constexpr int kDepth = 64;   // of a stage: 128 bytes
constexpr int kRows = 64;    // of weights
constexpr int kTokens = 64;
constexpr int kStages = 6;
constexpr int kPitch = kRows + 4;
constexpr int kThreads = kWarpgroup + kWarp;

struct alignas(1024) Shared {
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
__device__ __forceinline__ void fetch(const DenseManyParams& p, Shared& s, uint32_t first_row, uint32_t begin, uint32_t steps) {
  auto ask_weights = [&](uint32_t step) {
    const uint32_t stage = step % kStages;
    barrier_arrive_expecting(&s.full[stage], sizeof(s.weight[stage]) + sizeof(s.tokens[stage]));
    copy_box(s.weight[stage], &p.weight, (begin + step) * kDepth, first_row, &s.full[stage]);
  };
  auto ask_tokens = [&](uint32_t step) {
    const uint32_t stage = step % kStages;
    copy_box(s.tokens[stage], &p.input, (begin + step) * kDepth, 0, &s.full[stage]);
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

__device__ __forceinline__ void multiply(Shared& s, uint32_t steps) {
  const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float sum[kTokens / 2] = {};
  auto add = [&](uint32_t step) {
    const uint32_t stage = step % kStages;
    barrier_wait(&s.full[stage], step / kStages & 1);
    const uint64_t left = operand_by_rows(s.weight[stage]), right = operand_by_rows(s.tokens[stage]);
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
  // Every warp has read what the sums are written over.
  asm volatile("bar.sync 1, %0;" ::"n"(kWarpgroup) : "memory");
  const uint32_t row = warp * 16 + lane / 4;
#pragma unroll
  for (int n = 0; n < kTokens / 8; n++) {
#pragma unroll
    for (int e = 0; e < 4; e++) s.part[n * 8 + lane % 4 * 2 + e % 2][row + e / 2 * 8] = sum[n * 4 + e];
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 2) dense_many(const __grid_constant__ DenseManyParams p) {
  extern __shared__ __align__(1024) uint8_t dynamic[];
  Shared& s = *reinterpret_cast<Shared*>(dynamic);
  const uint32_t first_row = blockIdx.x / p.parts * kRows, rank = blockIdx.x % p.parts;
  const uint32_t all = p.depth / kDepth, share = (all + p.parts - 1) / p.parts;
  const uint32_t begin = min(rank * share, all), steps = min(share, all - begin);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; stage++) {
      barrier_init(&s.full[stage], 1);
      barrier_init(&s.empty[stage], kWarpgroup / kWarp);
    }
    barrier_init_done();
  }
  __syncthreads();
  grid_trigger();
  if (threadIdx.x >= kWarpgroup) {
    if (threadIdx.x == kWarpgroup) fetch(p, s, first_row, begin, steps);
    __syncwarp();
  } else {
    multiply(s, steps);
  }
  grid_wait();
  cluster_sync();
  // Each block of the cluster adds up the parts of some tokens, in order.
  const uint32_t most = kTokens / p.parts, pieces = kRows / 8;
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

// Size of the dynamic shared memory, as the launcher computes it.
static_assert(sizeof(Shared) == 6 * (64 + 64) * 128 + 1024, "launcher's size");
