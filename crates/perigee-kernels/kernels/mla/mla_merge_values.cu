// For one token: the merge of attention's parts, and values out of the merged latent averages, in one kernel. A cluster of four blocks has a
// head. Each merges 128 channels of the latent, as mla_merge_wide, sends them to the others through distributed shared memory, rounded to
// bfloat16 as the products take them, and has 32 of the values, whose weights were asked for before the kernel ahead has ended.
#include "common/hopper.cuh"
#include "mla/params.h"

constexpr int kBlocks = 4;               // of a head
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kLatent = 512, kValue = 128;
constexpr int kChannels = kLatent / kBlocks;   // of the latent, that a block merges
constexpr int kHeld = 17;                      // parts of a warp under way
constexpr int kSpan = kHeld * kWarps;          // of the block
constexpr int kWeights = (kSpan + kWarp - 1) / kWarp;
constexpr int kWarpValues = kValue / kBlocks / kWarps;
constexpr int kPieces = kLatent / 8 / kWarp;   // of eight numbers a lane

static_assert(kChannels == 4 * kWarp && kWarp % kWarps == 0, "four channels a lane; a warp's parts lie in the same lanes");

struct MlaMergeValuesParams {
  MlaAttendParams attend;
  MlaValuesParams values;
};

struct Shared {
  alignas(16) float latent[kLatent];  // from all blocks
  float4 sums[kWarps][kWarp];
  uint64_t merged;                    // what comes from all blocks has arrived
};

extern "C" __global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kThreads, 1)
    mla_merge_values_bf16(const __grid_constant__ MlaMergeValuesParams both) {
  __shared__ Shared s;
  const MlaAttendParams& p = both.attend;
  const MlaValuesParams& v = both.values;
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t head = blockIdx.x / kBlocks, rank = cluster_rank();
  grid_trigger();
  const AttendMerge merge = p.merges[0];
  const uint32_t first_value = (rank * kWarps + warp) * kWarpValues;
  const bf16* weights = static_cast<const bf16*>(v.weight) + (static_cast<uint64_t>(head) * (v.nope + kValue) + v.nope + first_value) * kLatent;
  uint4 rows[kWarpValues][kPieces];
#pragma unroll
  for (int i = 0; i < kWarpValues; i++) {
#pragma unroll
    for (int piece = 0; piece < kPieces; piece++) rows[i][piece] = reinterpret_cast<const uint4*>(weights + i * kLatent)[lane + piece * kWarp];
  }
  if (threadIdx.x == 0) {
    barrier_init(&s.merged, 1);
    barrier_init_done();
    barrier_arrive_expecting(&s.merged, sizeof(s.latent));
  }
  __syncwarp();
  cluster_begin();
  grid_wait();

  const uint32_t channel = rank * kChannels;
  const uint64_t pitch = static_cast<uint64_t>(p.part_rows) * kLatent;
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
  float total = 0.0f, peak = -INFINITY;
  // Without tokens there is nothing to merge: one block of attention left the token's result itself.
  const uint32_t parts = merge.tokens > 0 ? merge.parts : 0;
  const uint64_t base = static_cast<uint64_t>(merge.first_part) * p.part_rows + head;
#pragma unroll 1
  for (uint32_t begin = 0; begin < parts; begin += kSpan) {
    const uint32_t count = min(static_cast<uint32_t>(kSpan), parts - begin);
    const float* lse = p.part_lse + base + static_cast<uint64_t>(begin) * p.part_rows;
    const float* output = p.part_output + (base + static_cast<uint64_t>(begin) * p.part_rows) * kLatent + channel + lane * 4;
    float weight[kWeights];
    float4 part[kHeld];
#pragma unroll
    for (int i = 0; i < kWeights; i++) {
      const uint32_t at = lane + i * kWarp;
      weight[i] = at < count ? lse[static_cast<uint64_t>(at) * p.part_rows] : -INFINITY;
    }
#pragma unroll
    for (int j = 0; j < kHeld; j++) {
      const uint32_t at = warp + j * kWarps;
      part[j] = at < count ? *reinterpret_cast<const float4*>(output + at * pitch) : float4{0.0f, 0.0f, 0.0f, 0.0f};
    }
    float next = peak;
#pragma unroll
    for (int i = 0; i < kWeights; i++) next = fmaxf(next, weight[i]);
    next = warp_max(next);
    // Nothing seen in any part: any finite reference does, and all weights are 0.
    const float reference = next == -INFINITY ? 0.0f : next;
    const float fade = expf(peak - reference);
    float mine = 0.0f;
#pragma unroll
    for (int i = 0; i < kWeights; i++) {
      weight[i] = expf(weight[i] - reference);
      mine += weight[i];
    }
    total = total * fade + warp_sum(mine);
    sum = {sum.x * fade, sum.y * fade, sum.z * fade, sum.w * fade};
    peak = next;
#pragma unroll
    for (int j = 0; j < kHeld; j++) {
      const float w = __shfl_sync(~0u, weight[j * kWarps / kWarp], warp + j * kWarps % kWarp);
      sum.x += w * part[j].x;
      sum.y += w * part[j].y;
      sum.z += w * part[j].z;
      sum.w += w * part[j].w;
    }
  }
  s.sums[warp][lane] = sum;
  __syncthreads();
  // Behind this all blocks of the cluster take what is stored to them.
  cluster_wait();
  if (threadIdx.x < kChannels) {
    float* to = p.output + head * kLatent + channel + threadIdx.x;
    float merged;
    if (merge.tokens > 0) {
      float whole = 0.0f;
#pragma unroll
      for (int other = 0; other < kWarps; other++) whole += reinterpret_cast<const float*>(s.sums[other])[threadIdx.x];
      merged = total > 0.0f ? whole / total : 0.0f;
      *to = merged;
      if (channel == 0 && threadIdx.x == 0) p.lse[head] = total > 0.0f ? peak + logf(total) : -INFINITY;
    } else {
      merged = *to;
    }
    merged = rounded<bf16>(merged);
#pragma unroll
    for (int block = 0; block < kBlocks; block++) {
      store_at(address_at(&s.latent[channel + threadIdx.x], block), merged, address_at(&s.merged, block));
    }
  }
  // The block's memory stays until all that is stored to it has arrived: every thread waits for it.
  barrier_wait_cluster(&s.merged, 0);
  float value[kWarpValues] = {};
#pragma unroll
  for (int piece = 0; piece < kPieces; piece++) {
    const float* x = &s.latent[(lane + piece * kWarp) * 8];
    const float4 low = *reinterpret_cast<const float4*>(x), high = *reinterpret_cast<const float4*>(x + 4);
    const float latent[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < kWarpValues; i++) {
      const uint32_t w[4] = {rows[i][piece].x, rows[i][piece].y, rows[i][piece].z, rows[i][piece].w};
#pragma unroll
      for (int e = 0; e < 4; e++) {
        value[i] += __uint_as_float(w[e] << 16) * latent[2 * e];
        value[i] += __uint_as_float(w[e] & 0xffff0000u) * latent[2 * e + 1];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kWarpValues; i++) {
    value[i] = warp_sum(value[i]);
    if (lane == 0) static_cast<bf16*>(v.out)[head * kValue + first_value + i] = narrow<bf16>(value[i]);
  }
}
