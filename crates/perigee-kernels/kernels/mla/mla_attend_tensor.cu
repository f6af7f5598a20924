// Attention over paged latents on tensor cores, for bfloat16 latents of 512 + 64 numbers: 64 query rows, or 32 in decoding (tokens times heads,
// all of which share the keys) against tiles of 32 keys. Scores, softmax and sums are float32; queries and weights enter the
// products as bfloat16. See README.md for the schedule.
#include "common/mma.cuh"
#include "mla/params.h"

constexpr int kKeys = 32;     // keys of a tile; tiles are aligned, so each lies in one page
constexpr int kThreads = 256;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// kRows query rows, kStages tiles of keys in flight. Warps split the rows into blocks of 16 and, kParts for each of them, the
// keys for scores and the latent channels for outputs.
template <int kLatent, int kRope, int kRows, int kStages>
struct Shared {
  static constexpr int kParts = kThreads / kWarp / (kRows / 16);
  static constexpr int kWidth = kLatent + kRope;
  static constexpr int kPitch = kWidth + 8;
  static constexpr int kWeightPitch = kKeys + 8;
  bf16 query[kRows][kPitch];
  bf16 keys[kStages][kKeys][kPitch];
  bf16 weights[kRows][kWeightPitch];
  float peak[kParts][kRows];   // of each part of the keys
  float total[kParts][kRows];
};

// Walks the tiles of an item's ranges.
struct Cursor {
  uint32_t range;
  uint32_t last_range;  // one past
  uint32_t position;    // first key of the tile, a multiple of kKeys
  AttendRange current;

  __device__ __forceinline__ Cursor(const MlaAttendParams& p, const AttendItem& item)
      : range(item.first_range), last_range(item.first_range + item.ranges), position(0) {
    open(p);
  }
  __device__ __forceinline__ void open(const MlaAttendParams& p) {
    if (range < last_range) {
      current = p.ranges[range];
      position = current.start / kKeys * kKeys;
    }
  }
  __device__ __forceinline__ bool done() const { return range >= last_range; }
  __device__ __forceinline__ void advance(const MlaAttendParams& p) {
    position += kKeys;
    if (position >= current.end) {
      range++;
      open(p);
    }
  }
};

// Asks for a tile; keys outside of the range are zeros, so that unused memory is never read.
template <int kWidth, int kPitch>
__device__ __forceinline__ void fetch(const MlaAttendParams& p, bf16 (*keys)[kPitch], const Cursor& cursor) {
  if (!cursor.done()) {
    const uint32_t page = p.pages[cursor.current.pages + cursor.position / kPageTokens - cursor.current.first_page];
    const bf16* source = static_cast<const bf16*>(p.latents) +
                         (static_cast<uint64_t>(page) * kPageTokens + cursor.position % kPageTokens) * kWidth;
#pragma unroll
    for (int at = threadIdx.x; at < kKeys * kWidth / 8; at += kThreads) {
      const int key = at / (kWidth / 8), channel = at % (kWidth / 8) * 8;
      const uint32_t position = cursor.position + key;
      copy_async(&keys[key][channel], source + key * kWidth + channel, position >= cursor.current.start && position < cursor.current.end);
    }
  }
  copy_commit();
}

template <int kLatent, int kRope, int kRows, int kStages>
__device__ __forceinline__ void attend(const MlaAttendParams& p) {
  extern __shared__ uint4 dynamic[];
  using S = Shared<kLatent, kRope, kRows, kStages>;
  S& s = *reinterpret_cast<S*>(dynamic);
  constexpr int kParts = S::kParts;
  constexpr int kTiles = kLatent / kParts / 8;   // of outputs of a warp
  constexpr int kPartKeys = kKeys / kParts;      // 16 or 8
  constexpr int kScoreTiles = kPartKeys / 8;
  grid_dependency();
  const AttendItem item = p.items[blockIdx.x];
  const uint32_t first_row = blockIdx.y * kRows;
  const uint32_t all_rows = item.tokens * p.heads;
  if (first_row >= all_rows) return;
  const uint32_t rows = min(static_cast<uint32_t>(kRows), all_rows - first_row);
  const uint64_t query_row = static_cast<uint64_t>(item.first_token) * p.heads + first_row;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int block = warp % (kRows / 16), part = warp / (kRows / 16);
  const int g = lane / 4, t = lane % 4;

  Cursor ahead(p, item), cursor(p, item);
#pragma unroll
  for (int stage = 0; stage < kStages - 1; stage++) {
    fetch<S::kWidth, S::kPitch>(p, s.keys[stage], ahead);
    if (!ahead.done()) ahead.advance(p);
  }
  for (int at = threadIdx.x; at < kRows * S::kWidth / 4; at += kThreads) {
    const int row = at / (S::kWidth / 4), channel = at % (S::kWidth / 4) * 4;
    float4 q = {0.0f, 0.0f, 0.0f, 0.0f};
    if (row < rows) q = *reinterpret_cast<const float4*>(p.queries + (query_row + row) * S::kWidth + channel);
    *reinterpret_cast<uint2*>(&s.query[row][channel]) = make_uint2(pack(q.x, q.y), pack(q.z, q.w));
  }

  // The thread's two rows: block * 16 + g and 8 below.
  uint32_t last[2];
  float peak[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
#pragma unroll
  for (int r = 0; r < 2; r++) last[r] = item.first_position + (first_row + block * 16 + g + r * 8) / p.heads;
  Accumulator output[kTiles] = {};
  const float scale = p.scale * kLog2e;

  for (int turn = 0; !cursor.done(); turn++, cursor.advance(p)) {
    copy_wait<kStages - 2>();
    // Also: every warp is done with the tile before, whose stage is filled next.
    __syncthreads();
    fetch<S::kWidth, S::kPitch>(p, s.keys[(turn + kStages - 1) % kStages], ahead);
    if (!ahead.done()) ahead.advance(p);
    const bf16(*keys)[S::kPitch] = s.keys[turn % kStages];

    Accumulator score[kScoreTiles] = {};
#pragma unroll
    for (int base = 0; base < S::kWidth; base += 32) {
      const FragmentA q0 = load_a(&s.query[block * 16][base], S::kPitch, lane);
      const FragmentA q1 = load_a(&s.query[block * 16][base + 16], S::kPitch, lane);
      if constexpr (kScoreTiles == 2) {
        FragmentB k[2];
        load_b_pair_transposed(k, &keys[part * 16][base], S::kPitch, lane);
        mma(score[0], q0, k[0]);
        mma(score[1], q0, k[1]);
        load_b_pair_transposed(k, &keys[part * 16][base + 16], S::kPitch, lane);
        mma(score[0], q1, k[0]);
        mma(score[1], q1, k[1]);
      } else {
        // Eight keys by 32 channels: four blocks of 8 x 8 make the fragments of two products.
        uint32_t x[4];
        load_blocks(x, &keys[part * 8 + lane % 8][base + lane / 8 * 8]);
        mma(score[0], q0, {{x[0], x[1]}});
        mma(score[0], q1, {{x[2], x[3]}});
      }
    }
    float best[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < kScoreTiles; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const uint32_t position = cursor.position + part * kPartKeys + n * 8 + t * 2 + e % 2;
        const bool seen = position >= cursor.current.start && position < cursor.current.end && position <= last[e / 2];
        score[n].x[e] = seen ? score[n].x[e] * scale : -INFINITY;
        best[e / 2] = fmaxf(best[e / 2], score[n].x[e]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      best[r] = fmaxf(best[r], __shfl_xor_sync(~0u, best[r], 1));
      best[r] = fmaxf(best[r], __shfl_xor_sync(~0u, best[r], 2));
      if (t == 0) s.peak[part][block * 16 + g + r * 8] = best[r];
    }
    __syncthreads();
    float old_weight[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = block * 16 + g + r * 8;
      float next = peak[r];
#pragma unroll
      for (int other = 0; other < kParts; other++) next = fmaxf(next, s.peak[other][row]);
      // Nothing seen yet: any finite reference does, and all weights are 0.
      const float reference = next == -INFINITY ? 0.0f : next;
      old_weight[r] = exp2f(peak[r] - reference);
      peak[r] = next;
      total[r] *= old_weight[r];
#pragma unroll
      for (int n = 0; n < kScoreTiles; n++) {
        const float a = exp2f(score[n].x[r * 2] - reference), b = exp2f(score[n].x[r * 2 + 1] - reference);
        total[r] += a + b;
        *reinterpret_cast<uint32_t*>(&s.weights[row][part * kPartKeys + n * 8 + t * 2]) = pack(a, b);
      }
    }
    if (old_weight[0] != 1.0f || old_weight[1] != 1.0f) {
#pragma unroll
      for (int n = 0; n < kTiles; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) output[n].x[e] *= old_weight[e / 2];
      }
    }
    __syncthreads();
#pragma unroll
    for (int base = 0; base < kKeys; base += 16) {
      const FragmentA w = load_a(&s.weights[block * 16][base], S::kWeightPitch, lane);
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        FragmentB v[2];
        load_b_pair(v, &keys[base][part * (kLatent / kParts) + n * 8], S::kPitch, lane);
        mma(output[n], w, v[0]);
        mma(output[n + 1], w, v[1]);
      }
    }
  }

  // Sums of all parts of the keys.
#pragma unroll
  for (int r = 0; r < 2; r++) {
    total[r] += __shfl_xor_sync(~0u, total[r], 1);
    total[r] += __shfl_xor_sync(~0u, total[r], 2);
    if (t == 0) s.total[part][block * 16 + g + r * 8] = total[r];
  }
  __syncthreads();
  const bool direct = item.part == kNoPart;
  const uint64_t target = direct ? query_row : static_cast<uint64_t>(item.part) * p.part_rows + first_row;
  float* outputs = direct ? p.output : p.part_output;
  float* lse = direct ? p.lse : p.part_lse;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = block * 16 + g + r * 8;
    if (row >= rows) continue;
    float sum = 0.0f;
#pragma unroll
    for (int other = 0; other < kParts; other++) sum += s.total[other][row];
    const float factor = sum > 0.0f ? 1.0f / sum : 0.0f;
    float* to = outputs + (target + row) * kLatent + part * (kLatent / kParts);
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
      *reinterpret_cast<float2*>(to + n * 8 + t * 2) = make_float2(output[n].x[r * 2] * factor, output[n].x[r * 2 + 1] * factor);
    }
    if (part == 0 && t == 0) lse[target + row] = sum > 0.0f ? (peak[r] + log2f(sum)) * kLn2 : -INFINITY;
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) mla_attend_tensor_64(const __grid_constant__ MlaAttendParams p) {
  attend<512, 64, 64, 3>(p);
}
// Two blocks a multiprocessor: while one computes, the other's keys arrive.
extern "C" __global__ void __launch_bounds__(kThreads, 2) mla_attend_tensor_32(const __grid_constant__ MlaAttendParams p) {
  attend<512, 64, 32, 2>(p);
}

// Sizes of the dynamic shared memory, as the launcher computes them.
static_assert(sizeof(Shared<512, 64, 64, 3>) == (64 + 3 * 32) * 584 * 2 + 64 * 40 * 2 + 2 * 2 * 64 * 4, "launcher's size");
static_assert(sizeof(Shared<512, 64, 32, 2>) == (32 + 2 * 32) * 584 * 2 + 32 * 40 * 2 + 2 * 4 * 32 * 4, "launcher's size");
