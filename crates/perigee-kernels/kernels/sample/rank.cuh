// Ranking one row of logits: a token ranks by its logit, the lower id first among equals, and a cut keeps the shortest prefix in
// that order whose mass (a count, or probability) reaches a target. One block a row. It draws nothing.
//
// The search goes down the bits of the logits as sortable integers, four at a time. Every thread sums masses in bins of its
// own, so nothing is atomic, and masses are integers, so the order of sums does not matter: results have the same bits in
// every run. Once the deciding bin holds few tokens they are sorted, and the cut is found among them exactly.
#pragma once

#include "common/common.cuh"
#include "sample/params.h"

constexpr int kRankThreads = 512;
constexpr int kRankDigits = 16;
constexpr int kRankList = 2048;
// A mass of 1, as a probability. A thread sees at most 512 tokens, so that 9 + 44 bits hold their mass and 11 their count.
constexpr double kRankUnit = 17592186044416.0;  // 2^44
constexpr int kRankMassBits = 53;

// Dynamic shared memory of a block.
struct RankShared {
  uint64_t bins[kRankDigits][kRankThreads];
  uint64_t list[kRankList];
};
static_assert(sizeof(RankShared) == 81920, "the launcher reserves this much");

// Integers that sort like the numbers; the two zeros are equal.
__device__ __forceinline__ uint32_t sort_key(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float of_key(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// A token's rank as one number, larger for better.
__device__ __forceinline__ uint64_t rank_of(uint32_t key, uint32_t token) { return static_cast<uint64_t>(key) << 32 | (~token & 0xffffffffu); }
__device__ __forceinline__ uint32_t key_of(uint64_t rank) { return static_cast<uint32_t>(rank >> 32); }
__device__ __forceinline__ uint32_t token_of(uint64_t rank) { return ~static_cast<uint32_t>(rank); }

__device__ __forceinline__ uint64_t warp_sum_u64(uint64_t x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

// Reduction over a block of kRankThreads by `join`, the same value in every thread; ends with a barrier.
template <class T, class Join>
__device__ __forceinline__ T block_reduce(T x, Join join) {
  constexpr int kWarps = kRankThreads / kWarp;
  __shared__ T scratch[kWarps];
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x = join(x, __shfl_xor_sync(~0u, x, distance));
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  // Each warp's value once: sums are reduced here too.
  x = scratch[threadIdx.x % kWarps];
#pragma unroll
  for (int distance = kWarps / 2; distance > 0; distance /= 2) x = join(x, __shfl_xor_sync(~0u, x, distance));
  __syncthreads();
  return x;
}

struct RankRow {
  const float* logits;
  const uint64_t* mask;  // or null
  uint32_t vocab;
};

// Calls f(token, logit) for every token that the mask allows, each in one thread.
template <class F>
__device__ __forceinline__ void scan(const RankRow& row, const F& f) {
  const bool aligned = row.vocab % 4 == 0;
#pragma unroll 2
  for (uint32_t first = threadIdx.x * 4; first < row.vocab; first += kRankThreads * 4) {
    const uint32_t count = min(4u, row.vocab - first);
    Quad x = {};
    if (aligned) {
      x = read4(row.logits + first);
    } else {
#pragma unroll
      for (uint32_t e = 0; e < 4; e++) x.x[e] = e < count ? row.logits[first + e] : 0.0f;
    }
    const uint32_t allowed = row.mask ? static_cast<uint32_t>(row.mask[first / 64] >> first % 64) : ~0u;
#pragma unroll
    for (uint32_t e = 0; e < 4; e++) {
      if (e < count && allowed >> e & 1) f(first + e, x.x[e]);
    }
  }
}

struct RankFound {
  uint64_t last;    // rank of the last token kept; 0 where nothing is cut
  uint64_t next;    // rank of the first one dropped; 0 where there is none
  double sum;       // mass of what is kept
  double before;    // without the last
  double target;
  bool many_ties;
};

// Sorts the first `count` of the list, descending; count is at most kRankList. Bitonic, padded with zeros.
__device__ __forceinline__ void sort_list(uint64_t* list, uint32_t count) {
  uint32_t size = 2;
  while (size < count) size *= 2;
  for (uint32_t i = count + threadIdx.x; i < size; i += kRankThreads) list[i] = 0;
  __syncthreads();
  for (uint32_t width = 2; width <= size; width *= 2) {
    for (uint32_t distance = width / 2; distance > 0; distance /= 2) {
      for (uint32_t pair = threadIdx.x; pair < size / 2; pair += kRankThreads) {
        const uint32_t low = pair / distance * distance * 2 + pair % distance, high = low + distance;
        const uint64_t a = list[low], b = list[high];
        if ((a < b) == ((low & width) == 0)) {
          list[low] = b;
          list[high] = a;
        }
      }
      __syncthreads();
    }
  }
}

// Cuts where the mass of the prefix reaches target_of(total mass, number of tokens); a negative target cuts nothing. Only tokens
// for which takes_part(token, logit, key) holds are ranked; their mass(key) may round to 0.
template <class TakesPart, class Mass, class Target>
__device__ __forceinline__ RankFound find_cut(const RankRow& row, RankShared& shared, const TakesPart& takes_part, const Mass& mass,
                                              const Target& target_of) {
  __shared__ uint64_t masses[kRankDigits];
  __shared__ uint32_t counts[kRankDigits];
  __shared__ uint32_t listed;
  RankFound found = {};
  uint64_t above = 0, prefix = 0;
  uint32_t inside = 0;
  int shift = 32;
  while (shift == 32 || (inside > kRankList && shift > 0)) {
    shift -= 4;
#pragma unroll
    for (int digit = 0; digit < kRankDigits; digit++) shared.bins[digit][threadIdx.x] = 0;
    scan(row, [&](uint32_t token, float logit) {
      const uint32_t key = sort_key(logit);
      if (static_cast<uint64_t>(key) >> (shift + 4) != prefix || !takes_part(token, logit, key)) return;
      shared.bins[key >> shift & (kRankDigits - 1)][threadIdx.x] += (1ull << kRankMassBits) + mass(key);
    });
    __syncthreads();
    // A warp a bin.
    uint64_t sum = 0, number = 0;
#pragma unroll
    for (int i = 0; i < kRankThreads / kWarp; i++) {
      const uint64_t bin = shared.bins[threadIdx.x / kWarp][threadIdx.x % kWarp + i * kWarp];
      sum += bin & ((1ull << kRankMassBits) - 1);
      number += bin >> kRankMassBits;
    }
    sum = warp_sum_u64(sum);
    number = warp_sum_u64(number);
    if (threadIdx.x % kWarp == 0) {
      masses[threadIdx.x / kWarp] = sum;
      counts[threadIdx.x / kWarp] = static_cast<uint32_t>(number);
    }
    __syncthreads();
    if (shift == 28) {
      uint64_t total = 0;
      uint32_t all = 0;
      for (int digit = 0; digit < kRankDigits; digit++) {
        total += masses[digit];
        all += counts[digit];
      }
      found.target = target_of(static_cast<double>(total), all);
      if (found.target < 0.0) return found;
    }
    int digit = kRankDigits - 1;
    while (digit > 0 && static_cast<double>(above + masses[digit]) < found.target) above += masses[digit--];
    prefix = prefix << 4 | digit;
    inside = counts[digit];
    __syncthreads();
  }
  if (inside > kRankList) {
    found.many_ties = true;
    return found;
  }

  if (threadIdx.x == 0) listed = 0;
  __syncthreads();
  uint64_t below = 0;
  scan(row, [&](uint32_t token, float logit) {
    const uint32_t key = sort_key(logit);
    const uint64_t bin = static_cast<uint64_t>(key) >> shift;
    if (bin > prefix || !takes_part(token, logit, key)) return;
    const uint64_t rank = rank_of(key, token);
    if (bin == prefix) {
      // In any order: the sort below makes it unique.
      shared.list[atomicAdd(&listed, 1)] = rank;
    } else if (rank > below) {
      below = rank;
    }
  });
  below = block_reduce(below, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
  sort_list(shared.list, inside);
  uint64_t* prefixes = &shared.bins[0][0];
  for (uint32_t i = threadIdx.x; i < inside; i += kRankThreads) prefixes[i] = mass(key_of(shared.list[i]));
  __syncthreads();
  if (threadIdx.x < kWarp) {
    uint64_t carried = above;
    for (uint32_t first = 0; first < inside; first += kWarp) {
      const uint32_t i = first + threadIdx.x;
      uint64_t sum = i < inside ? prefixes[i] : 0;
#pragma unroll
      for (int distance = 1; distance < kWarp; distance *= 2) {
        const uint64_t other = __shfl_up_sync(~0u, sum, distance);
        if (threadIdx.x >= distance) sum += other;
      }
      sum += carried;
      if (i < inside) prefixes[i] = sum;
      carried = __shfl_sync(~0u, sum, kWarp - 1);
    }
  }
  __syncthreads();
  // Prefix sums ascend, so exactly one place is the first to reach the target; the last one does in any case.
  uint32_t at = inside - 1;
  for (uint32_t i = threadIdx.x; i < inside; i += kRankThreads) {
    if (static_cast<double>(prefixes[i]) >= found.target) {
      at = min(at, i);
      break;
    }
  }
  at = block_reduce(at, [](uint32_t a, uint32_t b) { return min(a, b); });
  found.last = shared.list[at];
  found.next = at + 1 < inside ? shared.list[at + 1] : below;
  found.sum = static_cast<double>(prefixes[at]);
  found.before = static_cast<double>(at > 0 ? prefixes[at - 1] : above);
  __syncthreads();
  return found;
}
