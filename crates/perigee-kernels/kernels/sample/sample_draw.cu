// The draw itself: changes of single logits, Gumbel noise from the counter-based generator, the two best scores of a row. Every
// number is defined by perigee-sampling; see README.md for what differs in rounding.
#include <float.h>

#include "sample/rank.cuh"

constexpr int kDrawThreads = 256;
constexpr int kDrawQuads = 4;                                // of four tokens, for each thread
constexpr uint32_t kDrawTokens = kDrawThreads * kDrawQuads * 4;  // of a block
// More than twice the error of the float32 noise below.
constexpr double kNoiseError = 1e-5;

// Four random words for a counter under a key (Salmon et al. 2011, Philox4x32-10).
__device__ __forceinline__ uint4 philox(uint4 counter, uint32_t key_low, uint32_t key_high) {
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint64_t product_0 = static_cast<uint64_t>(0xD2511F53u) * counter.x, product_1 = static_cast<uint64_t>(0xCD9E8D57u) * counter.z;
    counter = {static_cast<uint32_t>(product_1 >> 32) ^ counter.y ^ key_low, static_cast<uint32_t>(product_1),
               static_cast<uint32_t>(product_0 >> 32) ^ counter.w ^ key_high, static_cast<uint32_t>(product_0)};
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
  return counter;
}

__device__ __forceinline__ uint4 noise_words(const SampleRow& draw, uint32_t quad) {
  return philox({draw.choice, static_cast<uint32_t>(draw.position), static_cast<uint32_t>(draw.position >> 32), quad},
                static_cast<uint32_t>(draw.seed), static_cast<uint32_t>(draw.seed >> 32));
}

// -ln(-ln u), u = (x + 0.5) / 2^32.
__device__ __forceinline__ double gumbel(uint32_t x) {
  const double u = (static_cast<double>(x) + 0.5) * (1.0 / 4294967296.0);
  return -log(-log(u));
}
// The same in float32, within 3e-6: close to u = 1 the inner logarithm is taken of 1 - u, which is exact.
__device__ __forceinline__ float rough_gumbel(uint32_t x) {
  constexpr float kScale = 1.0f / 4294967296.0f;
  const float inner = x < 0x80000000u ? -logf((static_cast<float>(x) + 0.5f) * kScale) : -log1pf(-((static_cast<float>(~x) + 0.5f) * kScale));
  return -logf(inner);
}

// The two best of some scores.
struct Lead {
  double best, second;
  uint32_t token;
};
__device__ __forceinline__ Lead joined(const Lead& a, const Lead& b) {
  const bool first = a.best > b.best || (a.best == b.best && a.token < b.token);
  return {first ? a.best : b.best, fmax(fmin(a.best, b.best), fmax(a.second, b.second)), first ? a.token : b.token};
}
__device__ __forceinline__ Lead warp_lead(Lead lead) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    lead = joined(lead, {__shfl_xor_sync(~0u, lead.best, distance), __shfl_xor_sync(~0u, lead.second, distance),
                         __shfl_xor_sync(~0u, lead.token, distance)});
  }
  return lead;
}
// Of a block of kDrawThreads, the same in every thread; ends with a barrier.
__device__ __forceinline__ Lead block_lead(Lead lead, Lead* scratch) {
  lead = warp_lead(lead);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = lead;
  __syncthreads();
  Lead all = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kDrawThreads / kWarp; warp++) all = joined(all, scratch[warp]);
  __syncthreads();
  return all;
}

// Prepares the cut of every row, and changes the logits of its listed tokens. Each step is one rounded float32 operation, in the
// order of perigee-sampling. Results beyond the finite numbers saturate: infinity keeps its one meaning, impossible.
extern "C" __global__ void __launch_bounds__(kDrawThreads) sample_prepare(const __grid_constant__ SampleParams p) {
  const SampleRow& draw = p.rows[blockIdx.x];
  float* logits = p.logits + static_cast<uint64_t>(blockIdx.x) * p.vocab;
  bool bad = false;
  for (uint32_t i = threadIdx.x; i < draw.changes; i += kDrawThreads) {
    SampleChange& change = p.changes[draw.first_change + i];
    float x = logits[change.token];
    change.raw = x;
    bad |= !(x < INFINITY);
    if (x != -INFINITY && change.flags & kChangePenalise) {
      x = x > 0.0f ? __fdiv_rn(x, draw.repetition) : __fmul_rn(x, draw.repetition);
      if (change.output > 0) {
        x = __fsub_rn(x, __fmul_rn(draw.frequency, static_cast<float>(change.output)));
        x = __fsub_rn(x, draw.presence);
      }
      x = fminf(fmaxf(x, -FLT_MAX), FLT_MAX);
    }
    if (x != -INFINITY && change.flags & kChangeBias) x = fminf(fmaxf(__fadd_rn(x, change.bias), -FLT_MAX), FLT_MAX);
    if (change.flags & kChangeBan) x = -INFINITY;
    logits[change.token] = x;
  }
  bad = __syncthreads_or(bad);
  if (threadIdx.x == 0) p.cuts[blockIdx.x] = {-INFINITY, INFINITY, 0, ~0u, bad ? kSampleBadLogit : 0u, 0};
}

// The two largest logits of a thread's share of kDrawTokens tokens, where nothing is added to them: a float32 number is its own score.
__device__ __forceinline__ Lead largest(const SampleParams& p, const float* logits, const uint64_t* mask, uint32_t first_quad, bool& bad) {
  float best = -INFINITY, second = -INFINITY;
  uint32_t token = ~0u;
  Quad all[kDrawQuads];
#pragma unroll
  for (int q = 0; q < kDrawQuads; q++) {
    const uint32_t first = (first_quad + q * kDrawThreads) * 4;
    const uint32_t count = first < p.vocab ? min(4u, p.vocab - first) : 0;
    all[q] = {{-INFINITY, -INFINITY, -INFINITY, -INFINITY}};
    if (p.vocab % 4 == 0) {
      if (count) all[q] = read4(logits + first);
    } else {
#pragma unroll
      for (uint32_t e = 0; e < 4; e++) {
        if (e < count) all[q].x[e] = logits[first + e];
      }
    }
  }
#pragma unroll
  for (int q = 0; q < kDrawQuads; q++) {
    const uint32_t first = (first_quad + q * kDrawThreads) * 4;
    const uint32_t allowed = mask && first < p.vocab ? static_cast<uint32_t>(mask[first / 64] >> first % 64) : ~0u;
#pragma unroll
    for (uint32_t e = 0; e < 4; e++) {
      const float x = all[q].x[e];
      bad |= !(x < INFINITY);
      if (!(allowed >> e & 1)) continue;
      // Tokens ascend, so the first of equals stays.
      second = fmaxf(second, fminf(best, x));
      if (x > best) {
        best = x;
        token = first + e;
      }
    }
  }
  // The sign of a zero is none of a score's.
  return {static_cast<double>(best) + 0.0, static_cast<double>(second) + 0.0, token};
}

// The two best scores of kDrawTokens tokens: blockIdx.x counts them, blockIdx.y rows. The noise is computed in float32 for all,
// and in float64 for those that are near the second best.
extern "C" __global__ void __launch_bounds__(kDrawThreads) sample_draw(const __grid_constant__ SampleParams p) {
  __shared__ Lead scratch[kDrawThreads / kWarp];
  const SampleRow& draw = p.rows[blockIdx.y];
  const SampleCut& cut = p.cuts[blockIdx.y];
  const float* logits = p.logits + static_cast<uint64_t>(blockIdx.y) * p.vocab;
  const uint64_t* mask = draw.mask == kSampleNone ? nullptr : p.masks + draw.mask;
  const bool greedy = draw.flags & kSampleGreedy;
  const double temperature = draw.temperature, bound = cut.bound;
  const uint64_t kept = rank_of(cut.key, cut.token);
  const uint32_t first_quad = blockIdx.x * (kDrawTokens / 4) + threadIdx.x;
  double rough[kDrawQuads][4];
  Lead lead = {-INFINITY, -INFINITY, ~0u};
  bool bad = false;
  auto leave = [&](Lead all) {
    bad = __syncthreads_or(bad);
    if (threadIdx.x == 0) {
      p.parts[static_cast<uint64_t>(blockIdx.y) * p.parts_per_row + blockIdx.x] = {all.best, all.second, all.token, bad ? kSampleBadLogit : 0u};
    }
  };
  if (greedy) return leave(block_lead(largest(p, logits, mask, first_quad, bad), scratch));
#pragma unroll
  for (int q = 0; q < kDrawQuads; q++) {
    const uint32_t quad = first_quad + q * kDrawThreads, first = quad * 4;
    const uint32_t count = first < p.vocab ? min(4u, p.vocab - first) : 0;
    Quad x = {};
    if (p.vocab % 4 == 0) {
      if (count) x = read4(logits + first);
    } else {
#pragma unroll
      for (uint32_t e = 0; e < 4; e++) x.x[e] = e < count ? logits[first + e] : 0.0f;
    }
    const uint32_t allowed = mask && count ? static_cast<uint32_t>(mask[first / 64] >> first % 64) : ~0u;
    const uint4 words = noise_words(draw, quad);
    const uint32_t bits[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (uint32_t e = 0; e < 4; e++) {
      rough[q][e] = -INFINITY;
      if (e >= count) continue;
      bad |= !(x.x[e] < INFINITY);
      if (x.x[e] == -INFINITY || !(allowed >> e & 1) || rank_of(sort_key(x.x[e]), first + e) < kept) continue;
      const double scaled = static_cast<double>(x.x[e]) / temperature + 0.0;
      if (scaled < bound) continue;
      rough[q][e] = scaled + static_cast<double>(rough_gumbel(bits[e]));
      lead.second = fmax(lead.second, fmin(lead.best, rough[q][e]));
      lead.best = fmax(lead.best, rough[q][e]);
    }
  }
  // Ids do not matter for a bound.
  const double least = block_lead(lead, scratch).second - 2.0 * kNoiseError;
  uint32_t near = 0;
#pragma unroll
  for (int q = 0; q < kDrawQuads; q++) {
#pragma unroll
    for (uint32_t e = 0; e < 4; e++) {
      if (rough[q][e] > -INFINITY && rough[q][e] >= least) near |= 1u << (q * 4 + e);
    }
  }
  lead = {-INFINITY, -INFINITY, ~0u};
  while (near) {
    const uint32_t at = __ffs(near) - 1;
    near &= near - 1;
    const uint32_t quad = first_quad + at / 4 * kDrawThreads, token = quad * 4 + at % 4;
    const uint4 words = noise_words(draw, quad);
    const double score = static_cast<double>(logits[token]) / temperature + 0.0 +
                         gumbel(at % 4 < 2 ? (at % 4 ? words.y : words.x) : (at % 4 == 3 ? words.w : words.z));
    lead = joined(lead, {score, -INFINITY, token});
  }
  leave(block_lead(lead, scratch));
}

// Joins the parts of a row, puts changed logits back, and writes the result. What sample_logprobs wrote is kept.
extern "C" __global__ void __launch_bounds__(kDrawThreads) sample_finish(const __grid_constant__ SampleParams p) {
  __shared__ Lead scratch[kDrawThreads / kWarp];
  const SampleRow& draw = p.rows[blockIdx.x];
  const SampleCut& cut = p.cuts[blockIdx.x];
  float* logits = p.logits + static_cast<uint64_t>(blockIdx.x) * p.vocab;
  for (uint32_t i = threadIdx.x; i < draw.changes; i += kDrawThreads) {
    const SampleChange& change = p.changes[draw.first_change + i];
    logits[change.token] = change.raw;
  }
  Lead lead = {-INFINITY, -INFINITY, ~0u};
  uint32_t bad = 0;
  for (uint32_t i = threadIdx.x; i < p.parts_per_row; i += kDrawThreads) {
    const SamplePart& part = p.parts[static_cast<uint64_t>(blockIdx.x) * p.parts_per_row + i];
    lead = joined(lead, {part.best, part.second, part.token});
    bad |= part.status;
  }
  bad = __syncthreads_or(bad);
  lead = block_lead(lead, scratch);
  if (threadIdx.x == 0) {
    SampleResult& result = p.results[blockIdx.x];
    uint32_t status = cut.status | (bad ? kSampleBadLogit : 0u) | (lead.token == ~0u ? kSampleNobody : 0u);
    if (draw.alternatives > 0) status |= result.status;
    result.status = status;
    result.token = lead.token;
    result.margin = static_cast<float>(fmin(lead.best - lead.second, cut.margin));
    if (draw.alternatives > 0 && status == 0) {
      result.logprob = static_cast<float>(static_cast<double>(logits[lead.token]) - result.normaliser);
    }
  }
}
