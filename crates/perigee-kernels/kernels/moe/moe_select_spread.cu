// Selection and sort of some dozen tokens in one kernel whose blocks all sort: each publishes its token's experts as 256 bits, reads
// those of all tokens, and places its own entries. See README.md.
#include "moe/choose.cuh"

constexpr int kThreads = kWarpExperts;
constexpr int kGroups = kMostMeeting / kWarp;  // of 32 tokens
static_assert(kSelectWarps == kMeetingWords, "a word for every warp");

// Lane i's word becomes bit i of the words of all lanes, as a matrix of 32 x 32 bits is transposed.
__device__ __forceinline__ uint32_t transpose(uint32_t x) {
  const uint32_t lane = threadIdx.x % kWarp;
#pragma unroll
  for (uint32_t distance = kWarp / 2; distance > 0; distance /= 2) {
    const uint32_t low = ~0u / ((1u << distance) + 1);
    const uint32_t other = __shfl_xor_sync(~0u, x, distance);
    x = lane & distance ? (x & ~low) | ((other & ~low) >> distance) : (x & low) | ((other & low) << distance);
  }
  return x;
}

// The number of the launch and the bits are one word of memory, so that who sees the one sees the other: no fence is between them.
__device__ __forceinline__ void publish(unsigned long long* to, uint32_t launch, uint32_t bits) {
  const unsigned long long word = static_cast<unsigned long long>(launch) << 32 | bits;
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}

// The words of this warp's experts of all live tokens, token lane + 32 g in place g. All blocks that publish are on the device: their
// number has room on it, and no block behind them begins before the last of them has let it.
__device__ __forceinline__ void gather(const unsigned long long* words, uint32_t live, uint32_t launch, uint32_t (&bits)[kGroups]) {
  const uint32_t lane = threadIdx.x % kWarp;
  uint32_t missing = 0;
#pragma unroll
  for (int g = 0; g < kGroups; g++) {
    bits[g] = 0;
    missing |= (g * kWarp + lane < live ? 1u : 0u) << g;
  }
  while (missing != 0) {
    unsigned long long seen[kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; g++) {
      seen[g] = 0;
      if (missing >> g & 1) asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(seen[g]) : "l"(words + g * kWarp + lane) : "memory");
    }
#pragma unroll
    for (int g = 0; g < kGroups; g++) {
      if ((missing >> g & 1) && static_cast<uint32_t>(seen[g] >> 32) == launch) {
        bits[g] = static_cast<uint32_t>(seen[g]);
        missing &= ~(1u << g);
      }
    }
  }
  __syncwarp();
}

extern "C" __global__ void __launch_bounds__(kThreads) moe_select_spread(const __grid_constant__ MoeRouteParams p) {
  __shared__ Selecting s;
  __shared__ uint32_t sums[kSelectWarps];
  const MoeSelectParams& q = p.select;
  const uint32_t token = blockIdx.x, expert = threadIdx.x, lane = expert % kWarp, warp = expert / kWarp, entries = q.top_k + q.shared;
  const uint32_t entry = token * entries;
  MoeMeeting* meeting = reinterpret_cast<MoeMeeting*>(p.arrived);
  grid_trigger();
  const float bias = expert < q.experts ? q.bias[expert] : 0.0f;
  const uint32_t live = min(*q.live, q.tokens);
  const bool is_live = token < live;
  grid_wait();
  if (!is_live) {
    if (expert < entries) {
      q.chosen[entry + expert] = kNoExpert;
      p.sort.position[entry + expert] = kNoExpert;
    }
    if (token > 0) return;
  }
  const uint32_t launch = __ldcg(&meeting->launches) + 1;

  // Parts of a score are added in their order; a few are under way at a time.
  float raw = 0.0f;
  if (is_live && expert < q.experts) {
    const uint32_t part = q.tokens * q.experts;
    const float* from = q.scores + token * q.experts + expert;
    constexpr uint32_t kAtOnce = 18;
    float parts[kAtOnce];
    for (uint32_t first = 0; first < q.parts; first += kAtOnce) {
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; i++) parts[i] = first + i < q.parts ? __ldcg(from + (first + i) * part) : 0.0f;
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; i++) raw += parts[i];
    }
  }

  // As `select` of choose.cuh, but that what is chosen is published before anything else is done with it.
  const float score = sigmoid(raw);
  const uint32_t nothing = sortable(-INFINITY);
  uint32_t key = is_live && expert < q.experts ? sortable(score + bias) : 0;
  if (key <= nothing) key = 0;
  s.keys[expert] = key;
  __syncwarp();
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
  uint32_t ahead = rank;
  if (rank < q.top_k) {
#pragma unroll
    for (int w = 0; w < kSelectWarps; w++) {
#pragma unroll
      for (int i = 0; i < kMostTop; i += 4) {
        const uint4 others = *reinterpret_cast<const uint4*>(&s.best[w][i]);
        const bool is_lower = w < warp, is_own = w == warp;
        if (!is_own) {
          ahead += others.x > key || (others.x == key && is_lower);
          ahead += others.y > key || (others.y == key && is_lower);
          ahead += others.z > key || (others.z == key && is_lower);
          ahead += others.w > key || (others.w == key && is_lower);
        }
      }
    }
  }
  bool is_chosen = ahead < q.top_k && key > 0;
  const uint32_t picked = __ballot_sync(~0u, is_chosen);
  if (lane == 0) s.members[warp] = picked;
  __syncthreads();
  uint32_t place = __popc(picked & ((1u << lane) - 1)), found = 0;
#pragma unroll
  for (int w = 0; w < kSelectWarps; w++) {
    const uint32_t count = __popc(s.members[w]);
    if (w < warp) place += count;
    found += count;
  }
  // Where too few can be picked, the result is not-a-number anyway; any experts do.
  const bool are_any = found < q.top_k;
  if (expert < kSelectWarps && is_live) {
    const uint32_t any = expert == 0 ? (1u << q.top_k) - 1 : 0;
    publish(&meeting->words[expert][token], launch, are_any ? any : s.members[expert]);
  }
  if (are_any) {
    is_chosen = is_live && expert < q.top_k;
    place = expert;
  }
  if (is_chosen) s.scores[place] = score;
  __syncthreads();
  if (is_live) {
    float sum = 0.0f;
    for (uint32_t choice = 0; choice < q.top_k; choice++) sum += s.scores[choice];
    const float factor = (q.renormalize ? 1.0f / (sum + 1e-20f) : 1.0f) * q.scale;
    if (is_chosen) {
      q.own[token * q.top_k + place] = expert;
      q.chosen[entry + place] = expert;
      q.weights[entry + place] = score * factor;
    }
    if (expert < q.shared) {
      q.chosen[entry + q.top_k + expert] = q.experts + expert;
      q.weights[entry + q.top_k + expert] = 1.0f;
    }
  }

  // An expert a thread: its tokens, then its first row and its first tile behind those of lower numbers.
  uint32_t bits[kGroups];
  gather(meeting->words[warp], live, launch, bits);
  uint32_t count = 0, within = 0;
#pragma unroll
  for (int g = 0; g < kGroups; g++) {
    if (g * kWarp >= live) break;
    const uint32_t tokens = transpose(bits[g]);
    count += __popc(tokens);
    if (g < token / kWarp) within += __popc(tokens);
    if (g == token / kWarp) within += __popc(tokens & ((1u << token % kWarp) - 1));
  }
  const uint32_t tiles = (count + p.sort.tile_rows - 1) / p.sort.tile_rows;
  // Rows in the low half, tiles in the high one.
  const uint32_t both = count | tiles << 16;
  uint32_t upto = both;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const uint32_t other = __shfl_up_sync(~0u, upto, distance);
    if (lane >= distance) upto += other;
  }
  if (lane == kWarp - 1) sums[warp] = upto;
  __syncthreads();
  uint32_t all = 0, before = upto - both;
#pragma unroll
  for (int w = 0; w < kSelectWarps; w++) {
    if (w < warp) before += sums[w];
    all += sums[w];
  }
  const uint32_t first_row = before & 0xffff, rows = all & 0xffff;
  if (is_chosen) {
    const uint32_t row = first_row + within;
    p.sort.source[row] = entry + place;
    p.sort.position[entry + place] = row;
  }
  if (is_live && expert < q.shared) {
    const uint32_t row = rows + expert * live + token, at = entry + q.top_k + expert;
    p.sort.source[row] = at;
    p.sort.position[at] = row;
  }
  if (token > 0) return;

  // The first block: the list of tiles. All who publish in this launch have read its number.
  uint32_t tile = before >> 16;
  for (uint32_t first = 0; first < count; first += p.sort.tile_rows) {
    p.sort.tiles[tile++] = {expert, first_row + first, min(p.sort.tile_rows, count - first)};
  }
  const uint32_t each = (live + p.sort.tile_rows - 1) / p.sort.tile_rows;
  for (uint32_t i = expert; i < q.shared * each; i += kThreads) {
    const uint32_t which = i / each, first = i % each * p.sort.tile_rows;
    p.sort.tiles[(all >> 16) + i] = {q.experts + which, rows + which * live + first, min(p.sort.tile_rows, live - first)};
  }
  const uint32_t touched = __popc(__ballot_sync(~0u, count > 0));
  if (lane == 0) atomicAdd(p.sort.touched, static_cast<unsigned long long>(touched));
  if (expert == 0) {
    *p.sort.tile_count = (all >> 16) + q.shared * each;
    meeting->launches = launch;
  }
}
