// Everything of a chunk that does not need the state: Lkk and Pqk, the solved U and Wd, and the decayed queries and keys. One
// block of 256 threads a (chunk, head), all chunks at once. See README.md for the maths and for why the diagonal 16 x 16
// blocks are formed pair by pair.
#include "common/mma.cuh"
#include "kda/inputs.cuh"

constexpr int kChunk = 64;
constexpr int kBlock = 16;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr float kLog2e = 1.4426950408889634f;

template <class T, int kDim>
struct Shared {
  static constexpr int kPitch = kDim + 16 / sizeof(T);
  static constexpr int kDecayPitch = kDim + 4;
  union {
    T query[kChunk][kPitch];              // after convolution and silu, not normed
    float update[kChunk][kDecayPitch];    // once the query has been used: rows of U as they are solved
  };
  T key[kChunk][kPitch];
  float decay[kChunk][kDecayPitch];       // G / ln 2, inclusive; rows of Wd as they are solved
  alignas(16) float lower[kChunk][kChunk];  // Lkk transposed: [j][i], zero unless j < i
  float query_factor[kChunk];             // 1 / |q| and the query scale
  float key_factor[kChunk];               // 1 / |k|
  float strength[kChunk];                 // beta
  float block_end[kChunk / kBlock][kDim]; // sum of g over each block of 16
};

// One halving of `scatter_sum`: lanes with this bit keep the upper half of the values, the others the lower one.
template <int kHalf>
__device__ __forceinline__ void scatter_step(float (&x)[kWarp], uint32_t lane) {
  const bool upper = lane & kHalf;
#pragma unroll
  for (int i = 0; i < kHalf; i++) {
    // Copies: a choice between array elements themselves would be made by address, in local memory.
    const float low = x[i], high = x[i + kHalf];
    x[i] = (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, kHalf);
  }
}

// Sums 32 values over the warp; lane i gets the sum of value i. 31 shuffles in all.
__device__ __forceinline__ float scatter_sum(float (&x)[kWarp], uint32_t lane) {
  scatter_step<16>(x, lane);
  scatter_step<8>(x, lane);
  scatter_step<4>(x, lane);
  scatter_step<2>(x, lane);
  scatter_step<1>(x, lane);
  return x[0];
}

// Rows, norms, write strengths and the running decay into shared memory. Rows beyond the chunk are zero: no decay, no write.
template <class T, int kDim>
__device__ __forceinline__ void load_chunk(const KdaParams& p, Shared<T, kDim>& s, uint32_t first, uint32_t tokens, uint32_t head) {
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t width = p.heads * kDim;
#pragma unroll 4
  for (uint32_t i = warp; i < kChunk; i += kWarps) {
    const T* row = static_cast<const T*>(p.convolved) + static_cast<uint64_t>(first + i) * 3 * width + head * kDim;
    float q_squares = 0.0f, k_squares = 0.0f;
#pragma unroll
    for (int e = 0; e < kDim / kWarp; e++) {
      const uint32_t c = e * kWarp + lane;
      const T q = i < tokens ? row[c] : narrow<T>(0.0f);
      const T k = i < tokens ? row[width + c] : narrow<T>(0.0f);
      s.query[i][c] = q;
      s.key[i][c] = k;
      q_squares += widen(q) * widen(q);
      k_squares += widen(k) * widen(k);
    }
    q_squares = warp_sum(q_squares);
    k_squares = warp_sum(k_squares);
    if (lane == 0) {
      s.query_factor[i] = p.query_scale / sqrtf(q_squares + 1e-6f);
      s.key_factor[i] = 1.0f / sqrtf(k_squares + 1e-6f);
      s.strength[i] = i < tokens ? write_strength<T>(p, first + i, head) : 0.0f;
    }
  }
  // The sum restarts in every block of 16, so four run at once; the ends of the blocks before are added afterwards.
  for (uint32_t task = threadIdx.x; task < kDim * (kChunk / kBlock); task += kThreads) {
    const uint32_t c = task % kDim, block = task / kDim;
    float z[kBlock];
#pragma unroll
    for (int i = 0; i < kBlock; i++) {
      // Rows beyond the chunk read its last token and count for nothing.
      const uint32_t at = block * kBlock + i;
      z[i] = log_decay(p, first + min(at, tokens - 1), head * kDim + c) * kLog2e;
      if (at >= tokens) z[i] = 0.0f;
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kBlock; i++) {
      sum += z[i];
      s.decay[block * kBlock + i][c] = sum;
    }
    s.block_end[block][c] = sum;
  }
  __syncthreads();
  for (uint32_t task = threadIdx.x; task < kDim * (kChunk / kBlock - 1); task += kThreads) {
    const uint32_t c = task % kDim, block = task / kDim + 1;
    float before = 0.0f;
    for (uint32_t b = 0; b < block; b++) before += s.block_end[b][c];
#pragma unroll
    for (int i = 0; i < kBlock; i++) s.decay[block * kBlock + i][c] += before;
  }
  __syncthreads();
}

// One row against the 16 columns of one block, pair by pair: e^{G_i - G_j} is formed directly and never above 1. Lane j gets
// the sum for q, lane 16 + j the one for k.
template <class T, int kDim, Fault kFault>
__device__ __forceinline__ float pairwise_row(const Shared<T, kDim>& s, int i, int block, uint32_t lane) {
  constexpr int kSpan = kDim / kWarp;
  float q[kSpan], k[kSpan], g[kSpan], g_read[kSpan];
#pragma unroll
  for (int e = 0; e < kSpan; e++) {
    const int c = e * kWarp + lane;
    q[e] = widen(s.query[i][c]);
    k[e] = widen(s.key[i][c]);
    g[e] = s.decay[i][c];
    g_read[e] = kFault != Fault::kDecayAfterRead ? g[e] : i > 0 ? s.decay[i - 1][c] : 0.0f;
  }
  float sums[kWarp];
#pragma unroll
  for (int j = 0; j < kBlock; j++) {
    float q_sum = 0.0f, k_sum = 0.0f;
    const int row = block * kBlock + j;
    if (row <= i) {
#pragma unroll
      for (int e = 0; e < kSpan; e++) {
        const int c = e * kWarp + lane;
        const float factor = widen(s.key[row][c]) * exp2f(g[e] - s.decay[row][c]);
        q_sum += q[e] * factor;
        // With row == i the sum is not used.
        k_sum += k[e] * (kFault == Fault::kDecayAfterRead ? widen(s.key[row][c]) * exp2f(g_read[e] - s.decay[row][c]) : factor);
      }
    }
    sums[j] = q_sum;
    sums[kBlock + j] = k_sum;
  }
  return scatter_sum(sums, lane);
}

// Stores one element of Lkk or Pqk from its raw sum.
template <class T, int kDim>
__device__ __forceinline__ void store_pair(Shared<T, kDim>& s, T* attention, int i, int j, bool of_query, float sum) {
  if (of_query) {
    attention[i * kChunk + j] = narrow<T>(j <= i ? sum * s.query_factor[i] * s.key_factor[j] : 0.0f);
  } else {
    s.lower[j][i] = j < i ? sum * s.strength[i] * s.key_factor[i] * s.key_factor[j] : 0.0f;
  }
}

// Takes column j of Lkk times x out of 16 rows that begin at `first`.
template <class S>
__device__ __forceinline__ void eliminate(const S& s, float (&rows)[kBlock], int j, int first, float x) {
#pragma unroll
  for (int i = 0; i < kBlock; i += 4) {
    const float4 l = *reinterpret_cast<const float4*>(&s.lower[j][first + i]);
    rows[i] -= l.x * x;
    rows[i + 1] -= l.y * x;
    rows[i + 2] -= l.z * x;
    rows[i + 3] -= l.w * x;
  }
}

// Forward substitution of one column of (I + Lkk) X = B in float32, 16 rows in registers at a time. `right(i)` gives B and
// `solved` is the column's place for X, in shared memory; only this thread touches either.
template <class S, class Right>
__device__ __forceinline__ void solve_column(const S& s, float* solved, int pitch, Right right) {
#pragma unroll 1
  for (int first = 0; first < kChunk; first += kBlock) {
    float rows[kBlock];
#pragma unroll
    for (int i = 0; i < kBlock; i++) rows[i] = right(first + i);
#pragma unroll 4
    for (int j = 0; j < first; j++) eliminate(s, rows, j, first, solved[j * pitch]);
    // Within the block the rows at and above j meet zeros of Lkk.
#pragma unroll
    for (int j = 0; j < kBlock; j++) eliminate(s, rows, first + j, first, rows[j]);
#pragma unroll
    for (int i = 0; i < kBlock; i++) solved[(first + i) * pitch] = rows[i];
  }
}

template <class T, int kDim, Fault kFault = Fault::kNone>
__device__ __forceinline__ void prepare(const KdaParams& p) {
  extern __shared__ uint4 dynamic[];
  Shared<T, kDim>& s = *reinterpret_cast<Shared<T, kDim>*>(dynamic);
  grid_dependency();
  const KdaChunk chunk = p.chunks[p.first_chunk + blockIdx.x];
  const uint32_t head = blockIdx.y;
  const uint32_t first = p.rows[chunk.row].first_token + chunk.first;
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint64_t entry = static_cast<uint64_t>(blockIdx.x) * p.heads + head;
  T* attention = static_cast<T*>(p.attention) + entry * kChunk * kChunk;
  load_chunk<T, kDim>(p, s, first, chunk.tokens, head);

#pragma unroll 1
  for (int i = warp; i < kChunk; i += kWarps) {
    const int diagonal = i / kBlock;
#pragma unroll 1
    for (int block = 0; block <= diagonal; block++) {
      const float sum = pairwise_row<T, kDim, kFault>(s, i, block, lane);
      store_pair(s, attention, i, block * kBlock + lane % kBlock, lane < kBlock, sum);
    }
    for (int j = (diagonal + 1) * kBlock + lane; j < kChunk; j += kWarp) attention[i * kChunk + j] = narrow<T>(0.0f);
  }
  __syncthreads();

  const uint64_t rows = entry * kChunk * kDim;
  T* query = static_cast<T*>(p.query) + rows;
  T* key = static_cast<T*>(p.key) + rows;
#pragma unroll 2
  for (uint32_t at = threadIdx.x * 4; at < kChunk * kDim; at += kThreads * 4) {
    const uint32_t i = at / kDim, c = at % kDim;
    const Quad g = read4(&s.decay[i][c]), end = read4(&s.decay[kChunk - 1][c]);
    Quad q = read4(&s.query[i][c]), k = read4(&s.key[i][c]);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      q.x[e] *= s.query_factor[i] * exp2f(g.x[e]);
      k.x[e] *= s.key_factor[i] * exp2f(end.x[e] - g.x[e]);
    }
    write4(query + at, q);
    write4(key + at, k);
  }
  if (threadIdx.x < kDim) p.decay[entry * kDim + threadIdx.x] = exp2f(s.decay[kChunk - 1][threadIdx.x]);
  __syncthreads();

  // Half of the threads solve U, half Wd, each its own column; then all write rows.
  const uint32_t width = p.heads * kDim;
  constexpr int kPitch = Shared<T, kDim>::kDecayPitch;
  if (threadIdx.x < kDim) {
    const uint32_t c = threadIdx.x;
    const T* values = static_cast<const T*>(p.convolved) + static_cast<uint64_t>(first) * 3 * width + 2 * width + head * kDim + c;
    solve_column(s, &s.update[0][c], kPitch, [&](int i) {
      return i < chunk.tokens ? s.strength[i] * widen(values[static_cast<uint64_t>(i) * 3 * width]) : 0.0f;
    });
  } else if (threadIdx.x < 2 * kDim) {
    const uint32_t c = threadIdx.x - kDim;
    float before = 0.0f;  // rows are asked for in order, and overwritten by the solution
    solve_column(s, &s.decay[0][c], kPitch, [&](int i) {
      const float g = kFault == Fault::kDecayAfterRead ? before : s.decay[i][c];
      if (kFault == Fault::kDecayAfterRead) before = s.decay[i][c];
      return s.strength[i] * s.key_factor[i] * widen(s.key[i][c]) * exp2f(g);
    });
  }
  __syncthreads();
  T* erase = static_cast<T*>(p.erase) + rows;
  float* update = p.update + rows;
#pragma unroll 2
  for (uint32_t at = threadIdx.x * 4; at < kChunk * kDim; at += kThreads * 4) {
    const uint32_t i = at / kDim, c = at % kDim;
    write4(update + at, read4(&s.update[i][c]));
    write4(erase + at, read4(&s.decay[i][c]));
  }
}

#define KDA_CHUNK(type, suffix, dim)                                                                                     \
  extern "C" __global__ void __launch_bounds__(kThreads, 1) kda_chunk_##suffix##_##dim(const __grid_constant__ KdaParams p) { \
    prepare<type, dim>(p);                                                                                               \
  }
KDA_CHUNK(float, fp32, 32)
KDA_CHUNK(float, fp32, 64)
KDA_CHUNK(float, fp32, 128)

#ifdef PERIGEE_PLANTED_FAULTS
#define KDA_CHUNK_FAULT(dim)                                                                                                          \
  extern "C" __global__ void __launch_bounds__(kThreads, 1) kda_chunk_fp32_##dim##_decay_after_read(const __grid_constant__ KdaParams p) { \
    prepare<float, dim, Fault::kDecayAfterRead>(p);                                                                                   \
  }
KDA_CHUNK_FAULT(32)
KDA_CHUNK_FAULT(64)
KDA_CHUNK_FAULT(128)
#endif

// Sizes of the dynamic shared memory, as the launcher computes them.
static_assert(sizeof(Shared<float, 32>) == 2 * 64 * 36 * 4 + 64 * 36 * 4 + 64 * 64 * 4 + 3 * 64 * 4 + 4 * 32 * 4, "launcher's size");
