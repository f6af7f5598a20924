// What narrows a draw before noise decides: the cuts of top-k, top-p and min-p, and, on the model's own logits, log-sum-exp and the
// most likely tokens. One block a row; the search for a cut is in rank.cuh.
#include "sample/rank.cuh"

__device__ __forceinline__ double scaled_of(uint32_t key, double temperature) { return static_cast<double>(of_key(key)) / temperature; }

extern "C" __global__ void __launch_bounds__(kRankThreads) sample_filter(const __grid_constant__ SampleParams p) {
  extern __shared__ __align__(16) unsigned char memory[];
  RankShared& shared = *reinterpret_cast<RankShared*>(memory);
  const SampleRow& draw = p.rows[blockIdx.x];
  if (!(draw.flags & kSampleFiltered)) return;
  const RankRow row = {p.logits + static_cast<uint64_t>(blockIdx.x) * p.vocab, draw.mask == kSampleNone ? nullptr : p.masks + draw.mask, p.vocab};
  const double temperature = draw.temperature;
  const float impossible = -INFINITY;
  uint64_t first = 0;
  bool bad = false;
  scan(row, [&](uint32_t token, float logit) {
    bad |= !(logit < INFINITY);
    if (logit == impossible) return;
    const uint64_t rank = rank_of(sort_key(logit), token);
    first = rank > first ? rank : first;
  });
  first = block_reduce(first, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
  // Bad logits and rows without a candidate are for the next kernels to report.
  if (__syncthreads_or(bad) || first == 0) return;

  uint64_t last = 0;  // rank of the last token kept
  double margin = INFINITY;
  bool many_ties = false;
  if (draw.top_k > 0) {
    const double k = draw.top_k;
    const RankFound found = find_cut(
        row, shared, [&](uint32_t, float logit, uint32_t) { return logit != impossible; }, [](uint32_t) { return 1ull; },
        [&](double, uint32_t count) { return k < count ? k : -1.0; });
    many_ties |= found.many_ties;
    if (found.last) {
      last = found.last;
      margin = scaled_of(key_of(last), temperature) - scaled_of(key_of(found.next), temperature);
    }
  }
  if (draw.top_p < 1.0 && !many_ties) {
    const double largest = of_key(key_of(first)), p_kept = draw.top_p;
    const uint64_t kept = last;
    const RankFound found = find_cut(
        row, shared, [&](uint32_t token, float logit, uint32_t key) { return logit != impossible && rank_of(key, token) >= kept; },
        [&](uint32_t key) {
          const float exponent = static_cast<float>((static_cast<double>(of_key(key)) - largest) / temperature);
          return static_cast<unsigned long long>(static_cast<double>(expf(exponent)) * kRankUnit + 0.5);
        },
        [&](double total, uint32_t count) { return count < 2 ? -1.0 : p_kept * total; });
    many_ties |= found.many_ties;
    if (found.last) {
      last = found.last;
      if (found.next) {
        margin = fmin(margin, scaled_of(key_of(last), temperature) - scaled_of(key_of(found.next), temperature));
        margin = fmin(margin, log(found.sum / found.target));
      }
      if (found.before > 0.0) margin = fmin(margin, log(found.target / found.before));
    }
  }
  double bound = -INFINITY;
  if (draw.log_min_p > -INFINITY) {
    bound = scaled_of(key_of(first), temperature) + draw.log_min_p;
    double nearest = INFINITY;
    scan(row, [&](uint32_t token, float logit) {
      const uint32_t key = sort_key(logit);
      const uint64_t rank = rank_of(key, token);
      if (logit != impossible && rank >= last && rank != first) nearest = fmin(nearest, fabs(scaled_of(key, temperature) - bound));
    });
    margin = fmin(margin, block_reduce(nearest, [](double a, double b) { return fmin(a, b); }));
  }
  if (threadIdx.x == 0) {
    SampleCut& cut = p.cuts[blockIdx.x];
    cut.bound = bound;
    cut.margin = margin;
    cut.key = key_of(last);
    cut.token = last ? token_of(last) : ~0u;
    if (many_ties) cut.status |= kSampleTies;
  }
}

// Before anything changes the logits.
extern "C" __global__ void __launch_bounds__(kRankThreads) sample_logprobs(const __grid_constant__ SampleParams p) {
  extern __shared__ __align__(16) unsigned char memory[];
  RankShared& shared = *reinterpret_cast<RankShared*>(memory);
  __shared__ uint32_t listed;
  const SampleRow& draw = p.rows[blockIdx.x];
  if (draw.alternatives == 0) return;
  const RankRow row = {p.logits + static_cast<uint64_t>(blockIdx.x) * p.vocab, nullptr, p.vocab};
  SampleResult& result = p.results[blockIdx.x];
  float largest = -INFINITY;
  scan(row, [&](uint32_t, float logit) { largest = fmaxf(largest, logit); });
  largest = block_reduce(largest, [](float a, float b) { return fmaxf(a, b); });
  double sum = 0.0;
  if (largest > -INFINITY) scan(row, [&](uint32_t, float logit) { sum += expf(logit - largest); });
  sum = block_reduce(sum, [](double a, double b) { return a + b; });
  const double normaliser = largest + log(sum);

  const uint32_t wanted = min(draw.alternatives - 1, p.vocab);
  uint64_t last = 0;
  if (wanted > 0) {
    const RankFound found = find_cut(
        row, shared, [](uint32_t, float, uint32_t) { return true; }, [](uint32_t) { return 1ull; },
        [&](double, uint32_t count) { return wanted < count ? static_cast<double>(wanted) : -1.0; });
    last = found.many_ties ? ~0ull : found.last;
    if (threadIdx.x == 0) listed = 0;
    __syncthreads();
    scan(row, [&](uint32_t token, float logit) {
      const uint64_t rank = rank_of(sort_key(logit), token);
      if (rank >= last) shared.list[atomicAdd(&listed, 1)] = rank;
    });
    __syncthreads();
    sort_list(shared.list, listed);
    if (threadIdx.x < listed) {
      const uint64_t rank = shared.list[threadIdx.x];
      result.tokens[threadIdx.x] = token_of(rank);
      result.logprobs[threadIdx.x] = static_cast<float>(static_cast<double>(of_key(key_of(rank))) - normaliser);
    }
  }
  if (threadIdx.x == 0) {
    result.normaliser = normaliser;
    result.found = wanted > 0 ? listed : 0;
    result.status = last == ~0ull ? kSampleTies : 0;
  }
}
