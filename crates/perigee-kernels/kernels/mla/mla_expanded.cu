// Causal attention in the expanded form for heads of 128 + 64 numbers and values of 128, with Hopper's own matrix instructions: 128
// query tokens of one head a block against tiles of 128 keys. Keys and values of a stretch of the context lie expanded in working
// memory; a stretch's result is merged with that of the stretches before it. See README.md.
#include "common/hopper.cuh"
#include "mla/params.h"

constexpr int kTile = 128;        // query tokens of a block, and keys of a tile
constexpr int kSpan = 64;         // columns of a box: 128 bytes
constexpr int kKeySpans = 3;      // two of the head's own numbers, one of the key that all heads share
constexpr int kValueSpans = 2;
constexpr int kStages = 2;
constexpr int kNope = 128, kHead = 192, kValue = 128, kLatent = 512;
constexpr int kConsumers = 2;     // warpgroups that multiply, 64 query tokens each
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

struct alignas(1024) Shared {
  bf16 query[kKeySpans][kTile][kSpan];
  bf16 keys[kStages][kKeySpans][kTile][kSpan];
  bf16 values[kStages][kValueSpans][kTile][kSpan];
  uint64_t query_full;
  uint64_t keys_full[kStages];
  uint64_t keys_empty[kStages];
  uint64_t values_full[kStages];
  uint64_t values_empty[kStages];
};

// One thread asks for everything.
__device__ __forceinline__ void fetch(const MlaExpandedParams& p, Shared& s, const ExpandedItem& item, uint32_t head) {
  barrier_arrive_expecting(&s.query_full, sizeof(s.query));
  for (int span = 0; span < kKeySpans; span++) {
    copy_box(s.query[span], &p.queries, head * kHead + span * kSpan, item.first_token, &s.query_full);
  }
  const uint32_t tiles = (item.keys + kTile - 1) / kTile;
  for (uint32_t tile = 0; tile < tiles; tile++) {
    const uint32_t stage = tile % kStages, parity = tile / kStages & 1 ^ 1;
    const int row = item.first_row + tile * kTile, column = head * (kNope + kValue);
    barrier_wait(&s.keys_empty[stage], parity);
    barrier_arrive_expecting(&s.keys_full[stage], sizeof(s.keys[stage]));
    for (int span = 0; span < kNope / kSpan; span++) copy_box(s.keys[stage][span], &p.expanded, column + span * kSpan, row, &s.keys_full[stage]);
    copy_box(s.keys[stage][kNope / kSpan], &p.latents, kLatent, row, &s.keys_full[stage]);
    barrier_wait(&s.values_empty[stage], parity);
    barrier_arrive_expecting(&s.values_full[stage], sizeof(s.values[stage]));
    for (int span = 0; span < kValueSpans; span++) copy_box(s.values[stage][span], &p.expanded, column + kNope + span * kSpan, row, &s.values_full[stage]);
  }
}

// Rows g and g + 8 of a warp's 16: running maximum, in units of log 2, and sum of weights of this thread's columns.
struct Softmax {
  float peak[2] = {-INFINITY, -INFINITY};
  float total[2] = {0.0f, 0.0f};
  float fade[2];  // weight of what was summed before the last tile

  bool kept;      // `fade` is 1 for the whole warp

  // Scores become weights relative to a maximum: the new one, or the last if the new one is at most 2^8 of it, since weights of up to
  // 2^8 are as good as weights of up to 1; then nothing that was summed has to be scaled. With `kMasked`, key n of the tile counts for row r if n < limit[r].
  template <bool kMasked>
  __device__ __forceinline__ void take(float (&score)[kTile / 2], float scale, const int (&limit)[2], int t) {
    float next[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float best = -INFINITY;
#pragma unroll
      for (int n = 0; n < kTile / 8; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& x = score[n * 4 + r * 2 + e];
          if (kMasked && n * 8 + t * 2 + e >= limit[r]) x = -INFINITY;
          best = fmaxf(best, x);
        }
      }
      best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
      best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
      next[r] = fmaxf(peak[r], best * scale);
    }
    kept = __all_sync(~0u, next[0] - peak[0] <= 8.0f && next[1] - peak[1] <= 8.0f);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (!kept) {
        // Nothing seen yet: any finite reference does, and all weights are 0.
        fade[r] = power2(peak[r] - (next[r] == -INFINITY ? 0.0f : next[r]));
        peak[r] = next[r];
        total[r] *= fade[r];
      }
      const float reference = peak[r] == -INFINITY ? 0.0f : peak[r];
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kTile / 8; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& x = score[n * 4 + r * 2 + e];
          x = power2(x * scale - reference);
          sum += x;
        }
      }
      total[r] += sum;
    }
  }
};

// Weights as the left operand of the product with the values.
__device__ __forceinline__ void narrow_weights(FragmentA (&weights)[kTile / 16], const float (&score)[kTile / 2]) {
#pragma unroll
  for (int k = 0; k < kTile / 16; k++) {
#pragma unroll
    for (int i = 0; i < 4; i++) weights[k].x[i] = pack(score[k * 8 + i * 2], score[k * 8 + i * 2 + 1]);
  }
}

__device__ __forceinline__ void score_tile(float (&score)[kTile / 2], const Shared& s, uint32_t group, uint32_t stage) {
#pragma unroll
  for (int i = 0; i < kTile / 2; i++) score[i] = 0.0f;
  hold(score);
  products_begin();
#pragma unroll
  for (int span = 0; span < kKeySpans; span++) {
    const uint64_t left = operand_by_rows(s.query[span][group * 64]), right = operand_by_rows(s.keys[stage][span]);
#pragma unroll
    for (int k = 0; k < kSpan / 16; k++) product<kTile>(score, left + 2 * k, right + 2 * k);
  }
  products_commit();
}

__device__ __forceinline__ void sum_values(float (&output)[kValue / 2], const FragmentA (&weights)[kTile / 16], const Shared& s, uint32_t stage) {
  hold(output);
  products_begin();
  const uint64_t right = operand_by_columns(s.values[stage][0], sizeof(s.values[stage][0]));
#pragma unroll
  for (int k = 0; k < kTile / 16; k++) product_columns(output, weights[k], right + 128 * k);
  products_commit();
}

// Merges with what the stretches before left, and leaves the result for the next stretch or as values.
__device__ __forceinline__ void finish(const MlaExpandedParams& p, const ExpandedItem& item, uint32_t head, uint32_t row, float (&output)[kValue / 2],
                                       int r, float peak, float total, int t) {
  const bool valid = row < item.tokens;
  const uint64_t at = static_cast<uint64_t>(item.first_token + (valid ? row : 0)) * p.heads + head;
  float* running = p.output + static_cast<uint64_t>(item.first_token + (valid ? row : 0)) * p.heads * kLatent + head * kValue;
  float lse = total > 0.0f ? peak * kLn2 + logf(total) : -INFINITY;
  float mine = total > 0.0f ? 1.0f / total : 0.0f, before = 0.0f;
  if (!(item.flags & kFirstStretch)) {
    const float other = p.lse[at];
    const float most = fmaxf(lse, other);
    if (other > -INFINITY) {
      const float w = expf(lse - most), w_other = expf(other - most);
      mine *= w / (w + w_other);
      before = w_other / (w + w_other);
      lse = most + logf(w + w_other);
    }
  }
  // All four threads of the row have read what is written here.
  __syncwarp();
  if (!valid) return;
  if (t == 0) p.lse[at] = lse;
  bf16* values = static_cast<bf16*>(p.values) + static_cast<uint64_t>(item.first_token + row) * p.value_pitch + head * kValue;
#pragma unroll
  for (int n = 0; n < kValue / 8; n++) {
    float2 x = {output[n * 4 + r * 2] * mine, output[n * 4 + r * 2 + 1] * mine};
    float2* place = reinterpret_cast<float2*>(running + n * 8 + t * 2);
    if (before > 0.0f) {
      const float2 old = *place;
      x.x += before * old.x;
      x.y += before * old.y;
    }
    if (item.flags & kLastStretch) {
      *reinterpret_cast<uint32_t*>(values + n * 8 + t * 2) = pack(x.x, x.y);
    } else {
      *place = x;
    }
  }
}

__device__ __forceinline__ void attend(const MlaExpandedParams& p, Shared& s, const ExpandedItem& item, uint32_t head) {
  const uint32_t group = threadIdx.x / kWarpgroup, warp = threadIdx.x / kWarp % 4, lane = threadIdx.x % kWarp;
  const int g = lane / 4, t = lane % 4;
  const uint32_t first_row = group * 64 + warp * 16;  // of the warp, within the item
  const float scale = p.scale * kLog2e;
  const uint32_t tiles = (item.keys + kTile - 1) / kTile;
  // Keys of the stretch that the first row of the warp sees; each row below sees one more.
  const int seen = static_cast<int>(item.first_position + first_row) + 1 - static_cast<int>(item.first_key);
  Softmax softmax;
  float score[kTile / 2];
  float output[kValue / 2] = {};
  FragmentA weights[kTile / 16];
  auto weigh = [&](uint32_t tile) {
    const int base = tile * kTile;
    int limit[2];
#pragma unroll
    for (int r = 0; r < 2; r++) limit[r] = min(seen + g + r * 8, static_cast<int>(item.keys)) - base;
    if (min(seen, static_cast<int>(item.keys)) >= base + kTile) {
      softmax.take<false>(score, scale, limit, t);
    } else {
      softmax.take<true>(score, scale, limit, t);
    }
  };
  barrier_wait(&s.query_full, 0);
  barrier_wait(&s.keys_full[0], 0);
  score_tile(score, s, group, 0);
  products_wait<0>();
  hold(score);
  if (lane == 0) barrier_arrive(&s.keys_empty[0]);
  weigh(0);
  narrow_weights(weights, score);
  for (uint32_t tile = 1; tile < tiles; tile++) {
    const uint32_t stage = tile % kStages, before = (tile - 1) % kStages;
    barrier_wait(&s.keys_full[stage], tile / kStages & 1);
    score_tile(score, s, group, stage);
    barrier_wait(&s.values_full[before], (tile - 1) / kStages & 1);
    sum_values(output, weights, s, before);
    products_wait<1>();
    hold(score);
    if (lane == 0) barrier_arrive(&s.keys_empty[stage]);
    weigh(tile);
    products_wait<0>();
    hold(output);
    if (lane == 0) barrier_arrive(&s.values_empty[before]);
    if (!softmax.kept) {
#pragma unroll
      for (int i = 0; i < kValue / 2; i++) output[i] *= softmax.fade[i / 2 % 2];
    }
    narrow_weights(weights, score);
  }
  const uint32_t last = (tiles - 1) % kStages;
  barrier_wait(&s.values_full[last], (tiles - 1) / kStages & 1);
  sum_values(output, weights, s, last);
  products_wait<0>();
  hold(output);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float total = softmax.total[r];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    finish(p, item, head, first_row + g + r * 8, output, r, softmax.peak[r], total, t);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) mla_attend_expanded(const __grid_constant__ MlaExpandedParams p) {
  extern __shared__ __align__(1024) uint8_t dynamic[];
  Shared& s = *reinterpret_cast<Shared*>(dynamic);
  if (threadIdx.x == 0) {
    barrier_init(&s.query_full, 1);
    for (int stage = 0; stage < kStages; stage++) {
      barrier_init(&s.keys_full[stage], 1);
      barrier_init(&s.values_full[stage], 1);
      barrier_init(&s.keys_empty[stage], kConsumers * kWarpgroup / kWarp);
      barrier_init(&s.values_empty[stage], kConsumers * kWarpgroup / kWarp);
    }
    barrier_init_done();
  }
  __syncthreads();
  grid_dependency();
  const ExpandedItem item = p.items[blockIdx.x];
  const uint32_t head = blockIdx.y;
  if (threadIdx.x / kWarpgroup == kConsumers) {
    registers_down<24>();
    if (threadIdx.x == kConsumers * kWarpgroup) fetch(p, s, item, head);
  } else {
    registers_up<240>();
    attend(p, s, item, head);
  }
}

// Latents of a stretch from their pages, row after row: one block a run of keys within a page.
extern "C" __global__ void __launch_bounds__(256) mla_gather(const __grid_constant__ MlaGatherParams p) {
  grid_dependency();
  const GatherRun run = p.runs[blockIdx.x];
  const uint4* from = static_cast<const uint4*>(p.latents) + static_cast<uint64_t>(run.place) * p.pieces;
  uint4* to = static_cast<uint4*>(p.out) + static_cast<uint64_t>(run.row) * p.pieces;
#pragma unroll 4
  for (uint32_t at = threadIdx.x; at < run.keys * p.pieces; at += blockDim.x) to[at] = from[at];
}

// Size of the dynamic shared memory, as the launcher computes it.
static_assert(sizeof(Shared) == (3 + 2 * 5) * 128 * 128 + 1024, "launcher's size");
