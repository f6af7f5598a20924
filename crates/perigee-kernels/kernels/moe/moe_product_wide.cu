// Grouped products for many rows an expert, with Hopper's own matrix instructions: 128 weight rows by up to 256 sorted rows of one
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

// Sums of 64 weight rows by kRows tokens, then their results to memory.
template <bool kGated, int kRows, int kMostRows, int kStages>
__device__ __forceinline__ void multiply(const MoeWideParams& p, Shared<kMostRows, kStages>& s, const MoeTile& tile, uint32_t first_weight,
                                         Ring<kStages>& ring) {
  const uint32_t group = threadIdx.x / kWarpgroup, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float sum[kRows / 2] = {};
  for (uint32_t base = 0; base < p.depth; base += kDepth) {
    const uint32_t stage = ring.stage();
    barrier_wait(&s.full[stage], ring.parity());
    const uint64_t left = operand_by_rows(s.weight[stage][group * 64]), right = operand_by_rows(s.rows[stage]);
    hold(sum);
    products_begin();
#pragma unroll
    for (int k = 0; k < kDepth / 16; k++) product<kRows>(sum, left + 2 * k, right + 2 * k);
    products_commit();
    if (base > 0) {
      products_wait<1>();
      if (lane < kCluster) barrier_arrive_at(&s.empty[(ring.turn - 1) % kStages], lane);
    }
    ring.turn++;
  }
  products_wait<0>();
  hold(sum);
  if (lane < kCluster) barrier_arrive_at(&s.empty[(ring.turn - 1) % kStages], lane);

  // Blocks of 8 weight rows by 8 tokens, transposed on their way through shared memory so that 16 bytes of a token are together.
  bf16* out = static_cast<bf16*>(p.out);
  const uint32_t first = (first_weight + group * 64 + warp % 4 * 16) / (kGated ? 2 : 1);  // channel of `out`
  constexpr int kTokens = kGated ? 32 : 16;                                              // of a turn
#pragma unroll
  for (int base = 0; base < kRows; base += kTokens) {
    uint32_t x[4];
#pragma unroll
    for (int block = 0; block < 4; block++) {
      const int at = kGated ? base / 8 + block : base / 8 + block / 2;
      if (kGated) {
        // Rows g are gate, rows g + 8 up of the same channel.
        x[block] = at * 8 < kRows ? pack(silu(sum[at * 4 % (kRows / 2)]) * sum[(at * 4 + 2) % (kRows / 2)],
                                         silu(sum[(at * 4 + 1) % (kRows / 2)]) * sum[(at * 4 + 3) % (kRows / 2)])
                                  : 0;
      } else {
        x[block] = pack(sum[at * 4 + block % 2 * 2], sum[at * 4 + block % 2 * 2 + 1]);
      }
    }
    uint4* staging = s.staging[warp][base / kTokens % 2];
    const uint32_t place = kGated ? lane : (lane / 16 * 8 + lane % 8) * 2 + lane / 8 % 2;
    store_blocks_transposed(&staging[place], x);
    __syncwarp();
    const uint4 piece = staging[lane];
    const uint32_t token = base + (kGated ? lane : lane / 2);
    const uint32_t channel = first + (kGated ? 0 : lane % 2 * 8);
    if (token < tile.rows && channel < p.width) {
      *reinterpret_cast<uint4*>(out + static_cast<uint64_t>(tile.first + token) * p.width + channel) = piece;
    }
  }
  __syncwarp();
}

template <bool kGated, int kMostRows, int kStages>
__device__ __forceinline__ void multiply_any(const MoeWideParams& p, Shared<kMostRows, kStages>& s, const MoeTile& tile, uint32_t first_weight,
                                             Ring<kStages>& ring) {
  switch ((tile.rows + 15) / 16) {
#define PERIGEE_CASE(rows) \
  case rows / 16:          \
    if constexpr (rows <= kMostRows) multiply<kGated, rows>(p, s, tile, first_weight, ring); \
    break;
    PERIGEE_CASE(16) PERIGEE_CASE(32) PERIGEE_CASE(48) PERIGEE_CASE(64) PERIGEE_CASE(80) PERIGEE_CASE(96) PERIGEE_CASE(112) PERIGEE_CASE(128)
    PERIGEE_CASE(144) PERIGEE_CASE(160) PERIGEE_CASE(176) PERIGEE_CASE(192) PERIGEE_CASE(208) PERIGEE_CASE(224) PERIGEE_CASE(240) PERIGEE_CASE(256)
#undef PERIGEE_CASE
  }
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
MOE_WIDE(256, 4)

// Sizes of the dynamic shared memory, as the launcher computes them.
static_assert(sizeof(Shared<64, 8>) == 8 * (128 + 64) * 128 + 8 * 2 * 512 + 1024, "launcher's size");
static_assert(sizeof(Shared<256, 4>) == 4 * (128 + 256) * 128 + 8 * 2 * 512 + 1024, "launcher's size");
