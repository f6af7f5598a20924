// Attention of single tokens over paged latents with Hopper's own matrix instructions, for up to 32 heads of 512 + 64 numbers. A page,
// 64 keys, is a tile and the left operand: scores and outputs are computed transposed, with the heads as columns, so that nothing is
// computed for heads that there are not and no latent passes through registers. See README.md for the schedule.
#include "common/hopper.cuh"
#include "mla/params.h"

constexpr int kHeads = 32;
constexpr int kSpan = 64;          // columns of a box: 128 bytes
constexpr int kKeys = 64;          // of a tile
constexpr int kLatent = 512, kWidth = 576;
constexpr int kSpans = kWidth / kSpan, kStrips = kLatent / kSpan;
constexpr int kStageSpans = 3;     // boxes of a stage
constexpr int kTileStages = kSpans / kStageSpans;
constexpr int kStages = 7;
constexpr int kGroups = 2;         // warpgroups that take tiles in turn
constexpr int kWarps = kWarpgroup / kWarp;
constexpr int kConsumers = kGroups * kWarpgroup;
constexpr int kThreads = kConsumers + kWarpgroup;
constexpr int kSums = kHeads / 2;  // of a thread, in a product of 64 rows
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

static_assert(kKeys == kPageTokens, "a tile is a page");

struct alignas(1024) Shared {
  bf16 ring[kStages][kStageSpans][kKeys][kSpan];
  union {
    bf16 query[kSpans][kHeads][kSpan];
    float4 passed[kGroups][2 * kSums / 4][kWarpgroup];  // at the end of an item: two strips of outputs for the other group
  };
  bf16 weights[kGroups][kHeads][kKeys];
  float peaks[kGroups][2][kWarps][kHeads];  // of a tile, by turns
  float totals[kGroups][kWarps][kHeads];
  float last_peak[kGroups][kHeads];
  uint64_t full[kStages];
  uint64_t empty[kStages];
  uint64_t met;
};

// Waits for all threads of a group, or of both.
__device__ __forceinline__ void sync_group(uint32_t group) { asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(kWarpgroup) : "memory"); }
__device__ __forceinline__ void sync_groups() { asm volatile("bar.sync %0, %1;" ::"n"(kGroups + 1), "n"(kConsumers) : "memory"); }

// Waits for all threads of both groups, where one reads what the other wrote: by a barrier in shared memory, at which every thread arrives
// for itself, since the race checker loses now and then what a named barrier of a part of the block ordered. The caller keeps the parity.
__device__ __forceinline__ void meet(Shared& s, uint32_t& parity) {
  barrier_arrive(&s.met);
  barrier_wait(&s.met, parity);
  parity ^= 1;
}

// One thread asks for all tiles of the block's items. Pages that end before the item's token were full before this step: they are asked
// for before the kernel ahead has ended.
__device__ __forceinline__ void fetch(const MlaDecodeParams& p, Shared& s, uint32_t first_item, uint32_t last_item) {
  uint32_t turn = 0;
  bool has_waited = false;
  for (uint32_t index = first_item; index < last_item; index++) {
    const AttendItem item = p.attend.items[index];
    for (uint32_t r = item.first_range; r < item.first_range + item.ranges; r++) {
      const AttendRange range = p.attend.ranges[r];
      const uint32_t* pages = p.attend.pages + range.pages - range.first_page;
      for (uint32_t page = range.start / kKeys; page < (range.end + kKeys - 1) / kKeys; page++) {
        const int row = pages[page] * kKeys;
        if (!has_waited && (page + 1) * kKeys > item.first_position) {
          grid_wait();
          has_waited = true;
        }
        for (int part = 0; part < kTileStages; part++, turn++) {
          const uint32_t stage = turn % kStages;
          barrier_wait(&s.empty[stage], turn / kStages & 1 ^ 1);
          barrier_arrive_expecting(&s.full[stage], sizeof(s.ring[stage]));
          for (int span = 0; span < kStageSpans; span++) {
            copy_box(s.ring[stage][span], &p.latents, (part * kStageSpans + span) * kSpan, row, &s.full[stage]);
          }
        }
      }
    }
  }
}

// The item's queries as the right operand of the scores: bfloat16, swizzled, zeros for heads that there are not.
__device__ __forceinline__ void load_queries(const MlaAttendParams& p, Shared& s, const AttendItem& item) {
  const float* queries = p.queries + static_cast<uint64_t>(item.first_token) * p.heads * kWidth;
#pragma unroll 5
  for (int i = 0; i < kHeads * kWidth / 8 / kConsumers; i++) {
    const uint32_t at = threadIdx.x + i * kConsumers;
    const uint32_t head = at / (kWidth / 8), piece = at % (kWidth / 8);
    uint4 x = {};
    if (head < p.heads) {
      const float4* from = reinterpret_cast<const float4*>(queries + head * kWidth + piece * 8);
      const float4 a = from[0], b = from[1];
      x = {pack(a.x, a.y), pack(a.z, a.w), pack(b.x, b.y), pack(b.z, b.w)};
    }
    *reinterpret_cast<uint4*>(&s.query[piece / 8][head][(piece % 8 ^ head % 8) * 8]) = x;
  }
}

// What a group knows of the heads of its threads, two in each eight, in units of log 2.
struct Softmax {
  float peak[kHeads / 4];
  float total[kHeads / 4];  // of this thread's keys
};

// Scores of a tile become weights, the right operand of the outputs; outputs of the tiles before fade to the new maximum. Keys `first`
// to `last` of the tile count.
__device__ __forceinline__ void weigh(Shared& s, uint32_t group, uint32_t turn, float scale, int first, int last, float (&score)[kSums],
                                      Softmax& softmax, float (&output)[kStrips][kSums]) {
  const uint32_t warp = threadIdx.x / kWarp % kWarps, lane = threadIdx.x % kWarp;
  const int g = lane / 4, t = lane % 4;
  float best[kHeads / 4];
#pragma unroll
  for (int n = 0; n < kHeads / 8; n++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float& x = score[n * 4 + half * 2 + e];
        const int key = warp * 16 + half * 8 + g;
        x = key >= first && key < last ? x * scale : -INFINITY;
      }
      best[n * 2 + e] = fmaxf(score[n * 4 + e], score[n * 4 + 2 + e]);
    }
  }
#pragma unroll
  for (int distance = 4; distance < kWarp; distance *= 2) {
#pragma unroll
    for (int i = 0; i < kHeads / 4; i++) best[i] = fmaxf(best[i], __shfl_xor_sync(~0u, best[i], distance));
  }
  float(*peaks)[kHeads] = s.peaks[group][turn % 2];
  if (g == 0) {
#pragma unroll
    for (int n = 0; n < kHeads / 8; n++) *reinterpret_cast<float2*>(&peaks[warp][n * 8 + t * 2]) = make_float2(best[n * 2], best[n * 2 + 1]);
  }
  sync_group(group);
  float fade[kHeads / 4];
  bool fades = false;
#pragma unroll
  for (int n = 0; n < kHeads / 8; n++) {
    float2 all = *reinterpret_cast<const float2*>(&peaks[0][n * 8 + t * 2]);
#pragma unroll
    for (int other = 1; other < kWarps; other++) {
      const float2 more = *reinterpret_cast<const float2*>(&peaks[other][n * 8 + t * 2]);
      all = make_float2(fmaxf(all.x, more.x), fmaxf(all.y, more.y));
    }
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int i = n * 2 + e;
      const float next = fmaxf(softmax.peak[i], e ? all.y : all.x);
      // Nothing seen yet: any finite reference does, and all weights are 0.
      const float reference = next == -INFINITY ? 0.0f : next;
      fade[i] = power2(softmax.peak[i] - reference);
      fades |= fade[i] != 1.0f;
      softmax.peak[i] = next;
      const float a = power2(score[n * 4 + e] - reference), b = power2(score[n * 4 + 2 + e] - reference);
      softmax.total[i] = softmax.total[i] * fade[i] + (a + b);
      score[n * 4 + e] = a;
      score[n * 4 + 2 + e] = b;
    }
  }
#pragma unroll
  for (int n = 0; n < kHeads / 8; n += 2) {
    const uint32_t x[4] = {pack(score[n * 4], score[n * 4 + 1]), pack(score[n * 4 + 2], score[n * 4 + 3]),
                           pack(score[n * 4 + 4], score[n * 4 + 5]), pack(score[n * 4 + 6], score[n * 4 + 7])};
    const uint32_t head = n * 8 + lane / 16 * 8 + lane % 8, piece = warp * 2 + lane / 8 % 2;
    store_blocks_transposed(&s.weights[group][head][(piece ^ head % 8) * 8], x);
  }
  if (__any_sync(~0u, fades)) {
#pragma unroll
    for (int strip = 0; strip < kStrips; strip++) {
#pragma unroll
      for (int i = 0; i < kSums; i++) output[strip][i] *= fade[i / 4 * 2 + i % 2];
    }
  }
}

// The parts of the two groups are one: each finishes four strips of channels and gets the other's part of them, two at a time.
template <int kMine, int kOther>
__device__ __forceinline__ void finish(Shared& s, uint32_t group, uint32_t heads, const float (&factor)[kHeads / 4],
                                       float (&output)[kStrips][kSums], float* to, uint32_t& parity) {
  const uint32_t thread = threadIdx.x % kWarpgroup, warp = thread / kWarp, lane = thread % kWarp;
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int strip = 0; strip < kStrips; strip++) {
#pragma unroll
    for (int i = 0; i < kSums; i++) output[strip][i] *= factor[i / 4 * 2 + i % 2];
  }
#pragma unroll
  for (int round = 0; round < kStrips / 4; round++) {
#pragma unroll
    for (int i = 0; i < 2 * kSums / 4; i++) {
      const float* x = &output[kOther + round * 2 + i / 4][i % 4 * 4];
      s.passed[group][i][thread] = make_float4(x[0], x[1], x[2], x[3]);
    }
    meet(s, parity);
#pragma unroll
    for (int i = 0; i < 2 * kSums / 4; i++) {
      const float4 more = s.passed[1 - group][i][thread];
      float* x = &output[kMine + round * 2 + i / 4][i % 4 * 4];
      const float sums[4] = {x[0] + more.x, x[1] + more.y, x[2] + more.z, x[3] + more.w};
      const uint32_t channel = (kMine + round * 2 + i / 4) * kSpan + warp * 16 + g;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const uint32_t head = i % 4 * 8 + t * 2 + j % 2;
        if (head < heads) to[head * kLatent + channel + j / 2 * 8] = sums[j];
      }
    }
    meet(s, parity);
  }
}

__device__ __forceinline__ void attend(const MlaAttendParams& p, Shared& s, uint32_t first_item, uint32_t last_item) {
  const uint32_t group = threadIdx.x / kWarpgroup, warp = threadIdx.x / kWarp % kWarps, lane = threadIdx.x % kWarp;
  const int g = lane / 4, t = lane % 4;
  const float scale = p.scale * kLog2e;
  uint32_t tile = 0;    // of the block; groups take them in turn
  uint32_t parity = 0;  // of their meetings
  for (uint32_t index = first_item; index < last_item; index++) {
    const AttendItem item = p.items[index];
    load_queries(p, s, item);
    publish_to_products();
    sync_groups();
    Softmax softmax;
#pragma unroll
    for (int i = 0; i < kHeads / 4; i++) {
      softmax.peak[i] = -INFINITY;
      softmax.total[i] = 0.0f;
    }
    float output[kStrips][kSums] = {};
    for (uint32_t r = item.first_range; r < item.first_range + item.ranges; r++) {
      const AttendRange range = p.ranges[r];
      for (uint32_t page = range.start / kKeys; page < (range.end + kKeys - 1) / kKeys; page++, tile++) {
        if (tile % kGroups != group) continue;
        const uint32_t turn = tile * kTileStages;
        float score[kSums] = {};
#pragma unroll
        for (int part = 0; part < kTileStages; part++) {
          const uint32_t stage = (turn + part) % kStages;
          barrier_wait(&s.full[stage], (turn + part) / kStages & 1);
          hold(score);
          products_begin();
#pragma unroll
          for (int span = 0; span < kStageSpans; span++) {
            const uint64_t left = operand_by_rows(s.ring[stage][span]), right = operand_by_rows(s.query[part * kStageSpans + span]);
#pragma unroll
            for (int k = 0; k < kSpan / 16; k++) product<kHeads>(score, left + 2 * k, right + 2 * k);
          }
          products_commit();
        }
        products_wait<0>();
        hold(score);
        const int base = page * kKeys;
        const int first = static_cast<int>(range.start) - base, last = static_cast<int>(range.end) - base;
        if (first > 0 || last < kKeys) {
          // Unused memory may hold anything, also what is not a number.
          for (int at = threadIdx.x % kWarpgroup; at < kKeys * kStrips * 8; at += kWarpgroup) {
            const int key = at / (kStrips * 8), strip = at / 8 % kStrips;
            if (key >= first && key < last) continue;
            *reinterpret_cast<uint4*>(&s.ring[(turn + strip / kStageSpans) % kStages][strip % kStageSpans][key][at % 8 * 8]) = uint4{};
          }
        }
        weigh(s, group, tile / kGroups, scale, first, last, score, softmax, output);
        publish_to_products();
        sync_group(group);
        const uint64_t right = operand_by_rows(s.weights[group]);
#pragma unroll
        for (int strip = 0; strip < kStrips; strip++) hold(output[strip]);
        products_begin();
#pragma unroll
        for (int part = 0; part < kTileStages; part++) {
          const uint32_t stage = (turn + part) % kStages;
#pragma unroll
          for (int span = 0; span < kStageSpans; span++) {
            if (part * kStageSpans + span >= kStrips) continue;
            const uint64_t left = operand_by_columns(s.ring[stage][span], sizeof(s.ring[stage][span]));
#pragma unroll
            for (int k = 0; k < kKeys / 16; k++) product_transposed(output[part * kStageSpans + span], left + 128 * k, right + 2 * k);
          }
          products_commit();
        }
        products_wait<2>();
        if (lane == 0) barrier_arrive(&s.empty[turn % kStages]);
        products_wait<1>();
        if (lane == 0) barrier_arrive(&s.empty[(turn + 1) % kStages]);
        products_wait<0>();
        if (lane == 0) barrier_arrive(&s.empty[(turn + 2) % kStages]);
#pragma unroll
        for (int strip = 0; strip < kStrips; strip++) hold(output[strip]);
      }
    }
#pragma unroll
    for (int distance = 4; distance < kWarp; distance *= 2) {
#pragma unroll
      for (int i = 0; i < kHeads / 4; i++) softmax.total[i] += __shfl_xor_sync(~0u, softmax.total[i], distance);
    }
    if (g == 0) {
#pragma unroll
      for (int i = 0; i < kHeads / 4; i++) {
        const int head = i / 2 * 8 + t * 2 + i % 2;
        s.totals[group][warp][head] = softmax.total[i];
        if (warp == 0) s.last_peak[group][head] = softmax.peak[i];
      }
    }
    // Also: the queries are used no more.
    meet(s, parity);
    const bool direct = item.part == kNoPart;
    const uint64_t target = direct ? static_cast<uint64_t>(item.first_token) * p.heads : static_cast<uint64_t>(item.part) * p.part_rows;
    float* lse = (direct ? p.lse : p.part_lse) + target;
    float factor[kHeads / 4];
#pragma unroll
    for (int i = 0; i < kHeads / 4; i++) {
      const uint32_t head = i / 2 * 8 + t * 2 + i % 2;
      const float peak = fmaxf(s.last_peak[0][head], s.last_peak[1][head]);
      const float reference = peak == -INFINITY ? 0.0f : peak;
      float sum = 0.0f;
#pragma unroll
      for (int other = 0; other < kGroups; other++) {
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; w++) total += s.totals[other][w][head];
        sum += total * power2(s.last_peak[other][head] - reference);
      }
      factor[i] = sum > 0.0f ? power2(softmax.peak[i] - reference) / sum : 0.0f;
      if (group == 0 && warp == 0 && g == 0 && head < p.heads) lse[head] = sum > 0.0f ? (peak + log2f(sum)) * kLn2 : -INFINITY;
    }
    float* to = (direct ? p.output : p.part_output) + target * kLatent;
    if (group == 0) {
      finish<0, kStrips / 2>(s, group, p.heads, factor, output, to, parity);
    } else {
      finish<kStrips / 2, 0>(s, group, p.heads, factor, output, to, parity);
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) mla_decode(const __grid_constant__ MlaDecodeParams p) {
  extern __shared__ __align__(1024) uint8_t dynamic[];
  Shared& s = *reinterpret_cast<Shared*>(dynamic);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; stage++) {
      barrier_init(&s.full[stage], 1);
      barrier_init(&s.empty[stage], kWarps);
    }
    barrier_init(&s.met, kConsumers);
    barrier_init_done();
  }
  __syncthreads();
  grid_trigger();
  const uint32_t first_item = p.first_items[blockIdx.x], last_item = p.first_items[blockIdx.x + 1];
  if (threadIdx.x >= kConsumers) {
    registers_down<24>();
    if (threadIdx.x == kConsumers) fetch(p, s, first_item, last_item);
  } else {
    registers_up<240>();
    grid_wait();
    attend(p.attend, s, first_item, last_item);
  }
}

// Size of the dynamic shared memory, as the launcher computes it.
static_assert(sizeof(Shared) == 7 * 3 * 64 * 128 + 9 * 32 * 128 + 2 * 32 * 128 + 4 * 1024, "launcher's size");
