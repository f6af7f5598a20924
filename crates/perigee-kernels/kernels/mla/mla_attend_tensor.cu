// Attention over paged latents on tensor cores, for bfloat16 latents of 512 + 64 numbers: 64 query rows (tokens times heads, all
// of which share the keys) against tiles of 32 keys. Scores, softmax and sums are float32; queries and weights enter the
// products as bfloat16. See README.md for the schedule.
#include "common/mma.cuh"
#include "mla/params.h"

constexpr int kRows = 64;     // query rows of a block
constexpr int kKeys = 32;     // keys of a tile; tiles are aligned, so each lies in one page
constexpr int kStages = 3;
constexpr int kThreads = 256;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

template <int kLatent, int kRope>
struct Shared {
  static constexpr int kWidth = kLatent + kRope;
  static constexpr int kPitch = kWidth + 8;
  static constexpr int kWeightPitch = kKeys + 8;
  bf16 query[kRows][kPitch];
  bf16 keys[kStages][kKeys][kPitch];
  bf16 weights[kRows][kWeightPitch];
  float peak[2][kRows];   // of each half of the keys
  float total[2][kRows];
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
template <int kLatent, int kRope>
__device__ __forceinline__ void fetch(const MlaAttendParams& p, bf16 (*keys)[Shared<kLatent, kRope>::kPitch], const Cursor& cursor) {
  constexpr int kWidth = kLatent + kRope;
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

// Eight warps: four blocks of 16 rows by two halves, of the keys for scores and of the latent channels for outputs.
template <int kLatent, int kRope>
__device__ __forceinline__ void attend(const MlaAttendParams& p) {
  extern __shared__ uint4 dynamic[];
  using S = Shared<kLatent, kRope>;
  S& s = *reinterpret_cast<S*>(dynamic);
  constexpr int kTiles = kLatent / 2 / 8;
  const AttendItem item = p.items[blockIdx.x];
  const uint32_t first_row = blockIdx.y * kRows;
  const uint32_t all_rows = item.tokens * p.heads;
  if (first_row >= all_rows) return;
  const uint32_t rows = min(static_cast<uint32_t>(kRows), all_rows - first_row);
  const uint64_t query_row = static_cast<uint64_t>(item.first_token) * p.heads + first_row;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int block = warp % 4, half = warp / 4;
  const int g = lane / 4, t = lane % 4;

  Cursor ahead(p, item), cursor(p, item);
#pragma unroll
  for (int stage = 0; stage < kStages - 1; stage++) {
    fetch<kLatent, kRope>(p, s.keys[stage], ahead);
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
    fetch<kLatent, kRope>(p, s.keys[(turn + kStages - 1) % kStages], ahead);
    if (!ahead.done()) ahead.advance(p);
    const bf16(*keys)[S::kPitch] = s.keys[turn % kStages];

    Accumulator score[2] = {};
#pragma unroll
    for (int base = 0; base < S::kWidth; base += 16) {
      const FragmentA q = load_a(&s.query[block * 16][base], S::kPitch, lane);
      FragmentB k[2];
      load_b_pair_transposed(k, &keys[half * 16][base], S::kPitch, lane);
      mma(score[0], q, k[0]);
      mma(score[1], q, k[1]);
    }
    float best[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const uint32_t position = cursor.position + half * 16 + n * 8 + t * 2 + e % 2;
        const bool seen = position >= cursor.current.start && position < cursor.current.end && position <= last[e / 2];
        score[n].x[e] = seen ? score[n].x[e] * scale : -INFINITY;
        best[e / 2] = fmaxf(best[e / 2], score[n].x[e]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      best[r] = fmaxf(best[r], __shfl_xor_sync(~0u, best[r], 1));
      best[r] = fmaxf(best[r], __shfl_xor_sync(~0u, best[r], 2));
      if (t == 0) s.peak[half][block * 16 + g + r * 8] = best[r];
    }
    __syncthreads();
    float old_weight[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = block * 16 + g + r * 8;
      const float next = fmaxf(peak[r], fmaxf(s.peak[0][row], s.peak[1][row]));
      // Nothing seen yet: any finite reference does, and all weights are 0.
      const float reference = next == -INFINITY ? 0.0f : next;
      old_weight[r] = exp2f(peak[r] - reference);
      peak[r] = next;
      total[r] *= old_weight[r];
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const float a = exp2f(score[n].x[r * 2] - reference), b = exp2f(score[n].x[r * 2 + 1] - reference);
        total[r] += a + b;
        *reinterpret_cast<uint32_t*>(&s.weights[row][half * 16 + n * 8 + t * 2]) = pack(a, b);
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
        load_b_pair(v, &keys[base][half * (kLatent / 2) + n * 8], S::kPitch, lane);
        mma(output[n], w, v[0]);
        mma(output[n + 1], w, v[1]);
      }
    }
  }

  // Sums of both halves of the keys.
#pragma unroll
  for (int r = 0; r < 2; r++) {
    total[r] += __shfl_xor_sync(~0u, total[r], 1);
    total[r] += __shfl_xor_sync(~0u, total[r], 2);
    if (t == 0) s.total[half][block * 16 + g + r * 8] = total[r];
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
    const float sum = s.total[0][row] + s.total[1][row];
    const float factor = sum > 0.0f ? 1.0f / sum : 0.0f;
    float* to = outputs + (target + row) * kLatent + half * (kLatent / 2);
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
      *reinterpret_cast<float2*>(to + n * 8 + t * 2) = make_float2(output[n].x[r * 2] * factor, output[n].x[r * 2 + 1] * factor);
    }
    if (half == 0 && t == 0) lse[target + row] = sum > 0.0f ? (peak[r] + log2f(sum)) * kLn2 : -INFINITY;
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) mla_attend_tensor_512_64(const __grid_constant__ MlaAttendParams p) {
  attend<512, 64>(p);
}

// Size of the dynamic shared memory, as the launcher states it.
static_assert(sizeof(Shared<512, 64>) == (64 + 3 * 32) * 584 * 2 + 64 * 40 * 2 + 4 * 64 * 4, "launcher's size");
