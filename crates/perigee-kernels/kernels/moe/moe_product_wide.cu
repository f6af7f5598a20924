// Grouped products for many rows an expert, with Hopper's own matrix instructions: 128 weight rows by up to 288 sorted rows of one
// expert a tile, transposed: weights are the left operand, so that a tile is as wide as the expert has rows, in steps of 16. Two
// blocks, a cluster on neighbouring multiprocessors, work at the same rows with different weights, and each copies half of the rows
// for both. A block works through tiles; one thread copies ahead, two warpgroups multiply. See README.md.
#include "common/hopper.cuh"
#include "moe/params.h"

constexpr int kWeightRows = 128;  // of a tile, 64 a warpgroup
constexpr int kBoxRows = 32;      // sorted rows of a copy
constexpr int kDepth = 64;        // of a stage: 128 bytes
constexpr int kCluster = 2;
constexpr int kConsumers = 2;     // warpgroups that multiply
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kConsumerWarps = kConsumers * kWarpgroup / kWarp;

// kMostRows sorted rows of a tile: the fewer, the more stages there is room for.
template <int kMostRows, int kStages>
struct alignas(1024) Shared {
  bf16 weight[kStages][kWeightRows][kDepth];
  bf16 rows[kStages][kMostRows][kDepth];
  uint4 staging[kConsumerWarps][2][kWarp];
  uint64_t full[kStages];
  uint64_t empty[kStages];        // in both blocks of the cluster
};

// Where the ring of stages stands.
template <int kStages>
struct Ring {
  uint32_t turn = 0;
  __device__ __forceinline__ uint32_t stage() const { return turn % kStages; }
  __device__ __forceinline__ uint32_t parity() const { return turn / kStages & 1; }
};

// Where a block works next.
struct Place {
  uint32_t items;    // of the cluster
  uint32_t pairs;    // of blocks of weight rows
  uint32_t rank;
  __device__ __forceinline__ Place(const MoeWideParams& p, uint32_t weight_rows)
      : pairs((weight_rows + kCluster * kWeightRows - 1) / (kCluster * kWeightRows)), rank(cluster_rank()) {
    items = *p.tile_count * pairs;
  }
  __device__ __forceinline__ uint32_t first_weight(uint32_t item) const { return (item % pairs * kCluster + rank) * kWeightRows; }
};

// One thread asks for this block's weights and for every other box of rows, which go to both blocks.
template <int kMostRows, int kStages>
__device__ __forceinline__ void fetch(const MoeWideParams& p, Shared<kMostRows, kStages>& s, const MoeTile& tile, uint32_t weight_rows,
                                      uint32_t first_weight, uint32_t rank, Ring<kStages>& ring) {
  const uint32_t boxes = (tile.rows + kBoxRows - 1) / kBoxRows;
  const int weight_row = tile.expert * weight_rows + first_weight;
  for (uint32_t base = 0; base < p.depth; base += kDepth) {
    const uint32_t stage = ring.stage();
    barrier_wait(&s.empty[stage], ring.parity() ^ 1);
    barrier_arrive_expecting(&s.full[stage], sizeof(s.weight[stage]) + boxes * kBoxRows * kDepth * sizeof(bf16));
    copy_box(s.weight[stage], &p.weight, base, weight_row, &s.full[stage]);
    for (uint32_t box = rank; box < boxes; box += kCluster) {
      copy_box_to_all(s.rows[stage][box * kBoxRows], &p.rows, base, tile.first + box * kBoxRows, &s.full[stage], (1 << kCluster) - 1);
    }
    ring.turn++;
  }
}

// Sums of 16 weight rows from `first_row` on by kRows tokens to memory, in blocks of 8 by 8, transposed on their way through shared memory
// so that 16 bytes of a token are together.
template <bool kGated, int kRows>
__device__ __forceinline__ void store(const MoeWideParams& p, uint4 (&staging)[2][kWarp], const MoeTile& tile, uint32_t first_row,
                                      uint32_t first_token, const float (&sum)[kRows / 2], uint32_t lane) {
  bf16* out = static_cast<bf16*>(p.out);
  const uint32_t first = first_row / (kGated ? 2 : 1);  // channel of `out`
  constexpr int kTokens = kGated ? 32 : 16;             // of a turn
#pragma unroll
  for (int base = 0; base < kRows; base += kTokens) {
    uint32_t x[4];
#pragma unroll
    for (int block = 0; block < 4; block++) {
      const int at = kGated ? base / 8 + block : base / 8 + block / 2;
      if (kGated) {
        // Rows g are gate, rows g + 8 up of the same channel.
        x[block] = at * 8 < kRows ? pack(silu_for<bf16>(sum[at * 4 % (kRows / 2)]) * sum[(at * 4 + 2) % (kRows / 2)],
                                         silu_for<bf16>(sum[(at * 4 + 1) % (kRows / 2)]) * sum[(at * 4 + 3) % (kRows / 2)])
                                  : 0;
      } else {
        x[block] = pack(sum[at * 4 + block % 2 * 2], sum[at * 4 + block % 2 * 2 + 1]);
      }
    }
    uint4* turn = staging[base / kTokens % 2];
    const uint32_t place = kGated ? lane : (lane / 16 * 8 + lane % 8) * 2 + lane / 8 % 2;
    store_blocks_transposed(&turn[place], x);
    __syncwarp();
    const uint4 piece = turn[lane];
    const uint32_t token = base + (kGated ? lane : lane / 2);
    const uint32_t channel = first + (kGated ? 0 : lane % 2 * 8);
    if (token < kRows && first_token + token < tile.rows && channel < p.width) {
      *reinterpret_cast<uint4*>(out + static_cast<uint64_t>(tile.first + first_token + token) * p.width + channel) = piece;
    }
  }
  __syncwarp();
}

// Sums of a warpgroup, then their results to memory. Without kSplit it has half of the weight rows and all kRows tokens; with kSplit all
// weight rows and its half of the tokens, kRows of them, since twice as many do not fit its registers.
template <bool kGated, bool kSplit, int kRows, int kMostRows, int kStages>
__device__ __forceinline__ void multiply(const MoeWideParams& p, Shared<kMostRows, kStages>& s, const MoeTile& tile, uint32_t first_weight,
                                         Ring<kStages>& ring) {
  constexpr int kParts = kSplit ? 2 : 1;  // of 64 weight rows
  const uint32_t group = threadIdx.x / kWarpgroup, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t first_part = kSplit ? 0 : group, first_token = kSplit ? group * kRows : 0;
  float sum[kParts][kRows / 2] = {};
  for (uint32_t base = 0; base < p.depth; base += kDepth) {
    const uint32_t stage = ring.stage();
    barrier_wait(&s.full[stage], ring.parity());
    const uint64_t right = operand_by_rows(s.rows[stage][first_token]);
#pragma unroll
    for (int part = 0; part < kParts; part++) hold(sum[part]);
    products_begin();
#pragma unroll
    for (int part = 0; part < kParts; part++) {
      const uint64_t left = operand_by_rows(s.weight[stage][(first_part + part) * 64]);
#pragma unroll
      for (int k = 0; k < kDepth / 16; k++) product<kRows>(sum[part], left + 2 * k, right + 2 * k);
    }
    products_commit();
    if (base > 0) {
      products_wait<1>();
      if (lane < kCluster) barrier_arrive_at(&s.empty[(ring.turn - 1) % kStages], lane);
    }
    ring.turn++;
  }
  products_wait<0>();
#pragma unroll
  for (int part = 0; part < kParts; part++) hold(sum[part]);
  if (lane < kCluster) barrier_arrive_at(&s.empty[(ring.turn - 1) % kStages], lane);
#pragma unroll
  for (int part = 0; part < kParts; part++) {
    store<kGated, kRows>(p, s.staging[warp], tile, first_weight + (first_part + part) * 64 + warp % 4 * 16, first_token, sum[part], lane);
  }
}

template <bool kGated, int kMostRows, int kStages>
__device__ __forceinline__ void multiply_any(const MoeWideParams& p, Shared<kMostRows, kStages>& s, const MoeTile& tile, uint32_t first_weight,
                                             Ring<kStages>& ring) {
#define PERIGEE_CASE(rows, split) \
  case rows / 16:                 \
    if constexpr (rows <= kMostRows) multiply<kGated, split, rows>(p, s, tile, first_weight, ring); \
    break;
  if (tile.rows <= 144) {
    switch ((tile.rows + 15) / 16) {
      PERIGEE_CASE(16, false) PERIGEE_CASE(32, false) PERIGEE_CASE(48, false) PERIGEE_CASE(64, false) PERIGEE_CASE(80, false)
      PERIGEE_CASE(96, false) PERIGEE_CASE(112, false) PERIGEE_CASE(128, false) PERIGEE_CASE(144, false)
    }
  } else {
    switch ((tile.rows + 31) / 32) {
      PERIGEE_CASE(80, true) PERIGEE_CASE(96, true) PERIGEE_CASE(112, true) PERIGEE_CASE(128, true) PERIGEE_CASE(144, true)
    }
  }
#undef PERIGEE_CASE
}

template <bool kGated, int kMostRows, int kStages>
__device__ __forceinline__ void wide(const MoeWideParams& p) {
  extern __shared__ __align__(1024) uint8_t dynamic[];
  auto& s = *reinterpret_cast<Shared<kMostRows, kStages>*>(dynamic);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; stage++) {
      barrier_init(&s.full[stage], 1);
      barrier_init(&s.empty[stage], kCluster * kConsumerWarps);
    }
    barrier_init_done();
  }
  cluster_sync();
  grid_dependency();
  const uint32_t weight_rows = kGated ? 2 * p.width : p.width;
  const Place place(p, weight_rows);
  Ring<kStages> ring;
  if (threadIdx.x / kWarpgroup == kConsumers) {
    registers_down<24>();
    if (threadIdx.x == kConsumers * kWarpgroup) {
      for (uint32_t item = blockIdx.x / kCluster; item < place.items; item += gridDim.x / kCluster) {
        fetch(p, s, p.tiles[item / place.pairs], weight_rows, place.first_weight(item), place.rank, ring);
      }
    }
  } else {
    registers_up<240>();
    for (uint32_t item = blockIdx.x / kCluster; item < place.items; item += gridDim.x / kCluster) {
      multiply_any<kGated>(p, s, p.tiles[item / place.pairs], place.first_weight(item), ring);
    }
  }
  // The other block copies to this one's memory and arrives at its barriers until it is done.
  cluster_sync();
}

#define MOE_WIDE(rows, stages)                                                                                             \
  extern "C" __global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kThreads, 1)                               \
      moe_gate_up_wide_##rows(const __grid_constant__ MoeWideParams p) {                                                   \
    wide<true, rows, stages>(p);                                                                                           \
  }                                                                                                                        \
  extern "C" __global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kThreads, 1)                               \
      moe_down_wide_##rows(const __grid_constant__ MoeWideParams p) {                                                      \
    wide<false, rows, stages>(p);                                                                                          \
  }
MOE_WIDE(64, 8)
MOE_WIDE(288, 4)

// Sizes of the dynamic shared memory, as the launcher computes them.
static_assert(sizeof(Shared<64, 8>) == 8 * (128 + 64) * 128 + 8 * 2 * 512 + 1024, "launcher's size");
static_assert(sizeof(Shared<288, 4>) == 4 * (128 + 288) * 128 + 8 * 2 * 512 + 1024, "launcher's size");
