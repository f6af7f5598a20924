// The tokens of a step from what the step before drew, which the host has not read. A draw that was not made gives a token
// outside the vocabulary, of which the embedding makes zeros.
#include "common/common.cuh"
#include "sample/params.h"

extern "C" __global__ void sample_feed(const __grid_constant__ FeedParams p) {
  const uint32_t token = blockIdx.x * blockDim.x + threadIdx.x;
  if (token < p.count) p.tokens[token] = p.results[p.from[token]].token;
}
