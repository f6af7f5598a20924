// A token's experts by a whole block, an expert a thread, and the block that comes last of several: what the kernels that route few and
// some dozen tokens share.
#pragma once
#include "moe/sort.cuh"

constexpr uint32_t kMostChoices = 32;
constexpr int kSelectWarps = kWarpExperts / kWarp;
constexpr int kMostTop = 8;                       // k

// What a selection keeps in shared memory.
struct Selecting {
  alignas(16) uint32_t keys[kWarpExperts];      // of all experts
  alignas(16) uint32_t best[kSelectWarps][kMostTop];        // of each warp's experts, in order
  float scores[kMostTop];
  uint32_t members[kSelectWarps];               // of each warp's experts, those that are chosen
};

// The whole block: a token's experts from the thread's score before the sigmoid, as `select` of moe_select.cu without groups and forced
// choices. An expert a thread: its rank among the warp's experts, then, if it is high enough, among those of all warps.
__device__ __forceinline__ void select(const MoeSelectParams& p, uint32_t token, bool is_live, float raw, float bias, Selecting& s) {
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, expert = threadIdx.x, entries = p.top_k + p.shared;
  const uint64_t entry = static_cast<uint64_t>(token) * entries;
  if (!is_live) {
    if (expert < entries) p.chosen[entry + expert] = kNoExpert;
    return;
  }
  float score = 0.0f;
  uint32_t key = 0;
  if (expert < p.experts) {
    score = sigmoid(raw);
    key = sortable(score + bias);
  }
  // Minus infinity and not-a-number are never picked.
  const uint32_t nothing = sortable(-INFINITY);
  if (key <= nothing) key = 0;
  s.keys[expert] = key;
  __syncwarp();
  // Before it are larger keys, and equal ones of lower numbers.
  uint32_t rank = 0;
#pragma unroll
  for (int i = 0; i < kWarp; i += 4) {
    const uint4 others = *reinterpret_cast<const uint4*>(&s.keys[warp * kWarp + i]);
    rank += others.x > key || (others.x == key && i < lane);
    rank += others.y > key || (others.y == key && i + 1 < lane);
    rank += others.z > key || (others.z == key && i + 2 < lane);
    rank += others.w > key || (others.w == key && i + 3 < lane);
  }
  if (rank < kMostTop) s.best[warp][rank] = key;
  __syncthreads();
  uint32_t before = rank;
  if (rank < p.top_k) {
#pragma unroll
    for (int w = 0; w < kSelectWarps; w++) {
#pragma unroll
      for (int i = 0; i < kMostTop; i += 4) {
        const uint4 others = *reinterpret_cast<const uint4*>(&s.best[w][i]);
        const bool is_lower = w < warp, is_own = w == warp;
        if (!is_own) {
          before += others.x > key || (others.x == key && is_lower);
          before += others.y > key || (others.y == key && is_lower);
          before += others.z > key || (others.z == key && is_lower);
          before += others.w > key || (others.w == key && is_lower);
        }
      }
    }
  }
  bool is_chosen = before < p.top_k && key > 0;
  const uint32_t members = __ballot_sync(~0u, is_chosen);
  if (lane == 0) s.members[warp] = members;
  __syncthreads();
  uint32_t place = __popc(members & ((1u << lane) - 1)), found = 0;
#pragma unroll
  for (int w = 0; w < kSelectWarps; w++) {
    const uint32_t count = __popc(s.members[w]);
    if (w < warp) place += count;
    found += count;
  }
  // Where too few can be picked, the result is not-a-number anyway; any experts do.
  if (found < p.top_k) {
    is_chosen = expert < p.top_k;
    place = expert;
  }
  if (is_chosen) s.scores[place] = score;
  __syncthreads();
  float sum = 0.0f;
  for (uint32_t choice = 0; choice < p.top_k; choice++) sum += s.scores[choice];
  const float factor = (p.renormalize ? 1.0f / (sum + 1e-20f) : 1.0f) * p.scale;
  if (is_chosen) {
    p.own[static_cast<uint64_t>(token) * p.top_k + place] = expert;
    p.chosen[entry + place] = expert;
    p.weights[entry + place] = score * factor;
  }
  if (expert < p.shared) {
    p.chosen[entry + p.top_k + expert] = p.experts + expert;
    p.weights[entry + p.top_k + expert] = 1.0f;
  }
}

// Whether this block is the last of `count` to come here. What the others wrote before is seen behind it.
__device__ __forceinline__ bool is_last(uint32_t* arrived, uint32_t count) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(arrived, 1u) + 1 == count;
    if (last) *arrived = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// The whole block, an expert a thread: as `sort` of moe_select.cu, for up to kMostEntries, of which each thread has its share in registers.
template <uint32_t kMostEntries>
__device__ __forceinline__ void sort(const MoeSortParams& p) {
  constexpr int kThreads = kWarpExperts, kEach = kMostEntries / kThreads;
  __shared__ uint32_t counts[kWarpExperts + kMostChoices];
  for (uint32_t e = threadIdx.x; e < p.experts; e += kThreads) counts[e] = 0;
  uint32_t experts[kEach], within[kEach];
#pragma unroll
  for (int i = 0; i < kEach; i++) {
    const uint32_t entry = threadIdx.x + i * kThreads;
    experts[i] = entry < p.entries ? __ldcg(p.chosen + entry) : kNoExpert;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kEach; i++) within[i] = experts[i] != kNoExpert ? atomicAdd(&counts[experts[i]], 1u) : 0;
  __syncthreads();
  if (threadIdx.x < kWarp) place_experts(p, counts);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kEach; i++) {
    const uint32_t entry = threadIdx.x + i * kThreads;
    if (entry >= p.entries) continue;
    const uint32_t row = experts[i] != kNoExpert ? counts[experts[i]] + within[i] : kNoExpert;
    if (experts[i] != kNoExpert) p.source[row] = entry;
    p.position[entry] = row;
  }
}
