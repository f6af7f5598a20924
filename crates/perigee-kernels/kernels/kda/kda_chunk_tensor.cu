// Everything of a chunk that does not need the state, with bfloat16 activations: Pqk, the solved U and Wd, and the decayed queries and
// keys. One block of 256 threads a (chunk, head), two a multiprocessor. Pairs of rows are factored about a row between them, so that
// no exponent is above 0, and go through tensor cores down to neighbouring rows. See README.md for the maths.
#include "common/mma.cuh"
#include "kda/inputs.cuh"

constexpr int kChunk = 64;
constexpr int kBlock = 16;
constexpr int kBlocks = kChunk / kBlock;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr float kLog2e = 1.4426950408889634f;

template <int kDim>
struct Shared {
  static constexpr int kPitch = kDim + 8;
  static constexpr int kDecayPitch = kDim + 8;
  static constexpr int kSquarePitch = kChunk + 4;
  bf16 query[kChunk][kPitch];             // after convolution and silu, not normed; later the values
  bf16 key[kChunk][kPitch];
  float decay[kChunk][kDecayPitch];       // G / ln 2, inclusive
  float lower[kChunk][kSquarePitch];      // Lkk
  float inverse[kChunk][kSquarePitch];    // (I + Lkk)^-1; products on the way to it lie above its diagonal blocks
  float query_factor[kChunk];             // 1 / |q| and the query scale
  float key_factor[kChunk];               // 1 / |k|
  float strength[kChunk];                 // beta
  float diagonal[kChunk];                 // q . k of one row
  float block_end[kBlocks][kDim];         // sum of g over each block of 16
  uint32_t next;                          // task that no warp has taken
};

// ln(1 + e^z) / ln 2, to a relative 1e-5 and better: the sum for small e^z, for which 1 + e^z would lose them.
__device__ __forceinline__ float softplus2(float z) {
  const float scaled = z * kLog2e;
  const float e = power2(scaled);
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + e));
  const float small = e * kLog2e * (1.0f - e * (0.5f - e * (0.333333333f - 0.25f * e)));
  return z > 20.0f ? scaled : e < 0.015625f ? small : y;
}

// A fragment 16 x 8 and a B fragment 8 x 8 of m16n8k8: with g = lane / 4 and t = lane % 4, A is (g, t) (g + 8, t) (g, t + 4)
// (g + 8, t + 4), B is (t, g) (t + 4, g). The low 13 bits of a number are ignored.
__device__ __forceinline__ void mma_tf32(Accumulator& c, float a0, float a1, float a2, float a3, float b0, float b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)), "r"(__float_as_uint(b0)),
        "r"(__float_as_uint(b1)));
}

// To the nearest number that a product sees.
__device__ __forceinline__ float to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return __uint_as_float(y);
}

// Rows, norms, write strengths and the running decay into shared memory. Rows beyond the chunk are zero: no decay, no write. All that
// a thread reads from memory is asked for before any of it is used.
template <int kDim>
__device__ __forceinline__ void load_chunk(const KdaParams& p, Shared<kDim>& s, uint32_t first, uint32_t tokens, uint32_t head) {
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t width = p.heads * kDim;
  constexpr int kLanes = kDim / 4;               // of a row
  constexpr int kRows = kThreads / kLanes;       // at a time
  constexpr int kTurns = kChunk / kRows;
  const uint32_t c = threadIdx.x % kLanes * 4, first_row = threadIdx.x / kLanes;
  const bf16* rows = static_cast<const bf16*>(p.convolved) + static_cast<uint64_t>(first) * 3 * width + head * kDim + c;
  uint2 raw_q[kTurns], raw_k[kTurns];
#pragma unroll
  for (int turn = 0; turn < kTurns; turn++) {
    const uint32_t i = first_row + turn * kRows;
    raw_q[turn] = raw_k[turn] = {0, 0};
    if (i < tokens) {
      raw_q[turn] = *reinterpret_cast<const uint2*>(rows + i * 3 * width);
      raw_k[turn] = *reinterpret_cast<const uint2*>(rows + i * 3 * width + width);
    }
  }
  // The sum of decays restarts in every block of 16, a thread each; the ends of the blocks before are added afterwards.
  constexpr int kTasks = (kDim * kBlocks + kThreads - 1) / kThreads;
  float sums[kTasks][kBlock];
#pragma unroll
  for (int task = 0; task < kTasks; task++) {
    const uint32_t at = threadIdx.x + task * kThreads, channel = at % kDim, block = at / kDim % kBlocks;
    const float* gates = p.gates + static_cast<uint64_t>(first) * 2 * width + head * kDim + channel;
#pragma unroll
    for (int i = 0; i < kBlock; i++) sums[task][i] = gates[min(block * kBlock + i, tokens - 1) * 2 * width];
  }
  if (threadIdx.x < kChunk) s.strength[threadIdx.x] = threadIdx.x < tokens ? write_strength<bf16>(p, first + threadIdx.x, head) : 0.0f;
#pragma unroll
  for (int turn = 0; turn < kTurns; turn++) {
    const uint32_t i = first_row + turn * kRows;
    *reinterpret_cast<uint2*>(&s.query[i][c]) = raw_q[turn];
    *reinterpret_cast<uint2*>(&s.key[i][c]) = raw_k[turn];
    const Quad q = read4(reinterpret_cast<const bf16*>(&raw_q[turn])), k = read4(reinterpret_cast<const bf16*>(&raw_k[turn]));
    float qq = 0.0f, kk = 0.0f, qk = 0.0f;
#pragma unroll
    for (int e = 0; e < 4; e++) {
      qq += q.x[e] * q.x[e];
      kk += k.x[e] * k.x[e];
      qk += q.x[e] * k.x[e];
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      qq += __shfl_xor_sync(~0u, qq, distance);
      kk += __shfl_xor_sync(~0u, kk, distance);
      qk += __shfl_xor_sync(~0u, qk, distance);
    }
    if (lane % kLanes == 0) {
      s.query_factor[i] = p.query_scale * rsqrtf(qq + 1e-6f);
      s.key_factor[i] = rsqrtf(kk + 1e-6f);
      s.diagonal[i] = qk;
    }
  }
  const float rate = -expf(p.a_log[head]);
#pragma unroll
  for (int task = 0; task < kTasks; task++) {
    const uint32_t at = threadIdx.x + task * kThreads, channel = at % kDim, block = at / kDim % kBlocks;
    const float bias = p.dt_bias[head * kDim + channel];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kBlock; i++) {
      if (block * kBlock + i < tokens) sum += rate * softplus2(sums[task][i] + bias);
      sums[task][i] = sum;
    }
    if (at < kDim * kBlocks) s.block_end[block][channel] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int task = 0; task < kTasks; task++) {
    const uint32_t at = threadIdx.x + task * kThreads, channel = at % kDim, block = at / kDim;
    if (at >= kDim * kBlocks) break;
    float before = 0.0f;
#pragma unroll
    for (int b = 0; b < kBlocks - 1; b++) before += b < block ? s.block_end[b][channel] : 0.0f;
#pragma unroll
    for (int i = 0; i < kBlock; i++) s.decay[block * kBlock + i][channel] = before + sums[task][i];
  }
  __syncthreads();
}

// Stores one element of Lkk or Pqk from its raw sum.
template <int kDim>
__device__ __forceinline__ void store_query_pair(const Shared<kDim>& s, bf16* attention, int i, int j, float x, float y) {
  const float factor = s.query_factor[i];
  x = j <= i ? x * factor * s.key_factor[j] : 0.0f;
  y = j + 1 <= i ? y * factor * s.key_factor[j + 1] : 0.0f;
  *reinterpret_cast<uint32_t*>(&attention[i * kAttentionPitch + j]) = pack(x, y);
}
template <int kDim>
__device__ __forceinline__ void store_key_pair(Shared<kDim>& s, int i, int j, float x, float y) {
  const float factor = s.strength[i] * s.key_factor[i];
  s.lower[i][j] = j < i ? x * factor * s.key_factor[j] : 0.0f;
  s.lower[i][j + 1] = j + 1 < i ? y * factor * s.key_factor[j + 1] : 0.0f;
}

// Numbers of two rows g and g + 8, channels 2 t, 2 t + 1, 2 t + 8, 2 t + 9 from `base`: which k of a product a channel is does not matter.
struct Strip {
  float q[2][4], k[2][4], decay[2][4];
  template <int kDim>
  __device__ __forceinline__ Strip(const Shared<kDim>& s, const int (&rows)[2], int base, int t) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int c = base + half * 8 + t * 2;
        const float2 qs = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&s.query[rows[r]][c]));
        const float2 ks = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&s.key[rows[r]][c]));
        const float2 ds = *reinterpret_cast<const float2*>(&s.decay[rows[r]][c]);
        q[r][half * 2] = qs.x, q[r][half * 2 + 1] = qs.y;
        k[r][half * 2] = ks.x, k[r][half * 2 + 1] = ks.y;
        decay[r][half * 2] = ds.x, decay[r][half * 2 + 1] = ds.y;
      }
    }
  }
};

// Whether every factor of a block's rows about its ninth, the inverse ones too, is a number that float32 holds with room to spare.
template <int kDim>
__device__ __forceinline__ bool is_mild(const Shared<kDim>& s, int block, uint32_t lane) {
  constexpr float kMost = 96.0f;
  bool mild = true;
#pragma unroll
  for (int c = lane; c < kDim; c += kWarp) {
    const float about = s.decay[block * kBlock + kBlock / 2][c];
    mild = mild && s.decay[block * kBlock][c] - about < kMost && about - s.decay[block * kBlock + kBlock - 1][c] < kMost;
  }
  return __all_sync(~0u, mild);
}

// A diagonal block of 16 rows whose decay is mild: one product, all rows factored about the ninth. One warp. Above the diagonal is
// what nobody looks at, infinite at the worst.
template <int kDim>
__device__ __forceinline__ void mild_block(Shared<kDim>& s, bf16* attention, int block, uint32_t lane) {
  const int g = lane / 4, t = lane % 4;
  const int rows[2] = {block * kBlock + g, block * kBlock + g + 8};
  const float* reference = s.decay[block * kBlock + kBlock / 2];
  Accumulator q_sum[2] = {}, k_sum[2] = {};
#pragma unroll 2
  for (int base = 0; base < kDim; base += 16) {
    const Strip strip(s, rows, base, t);
    float a_q[2][4], a_k[2][4], b[2][4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float2 about = *reinterpret_cast<const float2*>(reference + base + half * 8 + t * 2);
#pragma unroll
      for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int at = half * 2 + e;
          const float apart = strip.decay[r][at] - (e ? about.y : about.x);
          const float factor = power2(apart);
          a_q[r][at] = strip.q[r][at] * factor;
          a_k[r][at] = strip.k[r][at] * factor;
          b[r][at] = strip.k[r][at] * power2(-apart);
        }
      }
    }
#pragma unroll
    for (int step = 0; step < 2; step++) {
#pragma unroll
      for (int n = 0; n < 2; n++) {
        mma_tf32(q_sum[n], a_q[0][step * 2], a_q[1][step * 2], a_q[0][step * 2 + 1], a_q[1][step * 2 + 1], b[n][step * 2], b[n][step * 2 + 1]);
        mma_tf32(k_sum[n], a_k[0][step * 2], a_k[1][step * 2], a_k[0][step * 2 + 1], a_k[1][step * 2 + 1], b[n][step * 2], b[n][step * 2 + 1]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const int i = rows[r], j = block * kBlock + n * 8 + t * 2;
      const float* q = &q_sum[n].x[r * 2];
      store_query_pair(s, attention, i, j, i == j ? s.diagonal[i] : q[0], i == j + 1 ? s.diagonal[i] : q[1]);
      store_key_pair(s, i, j, k_sum[n].x[r * 2], k_sum[n].x[r * 2 + 1]);
    }
  }
}

// The same whatever the decay. Rows i > j part at one of four levels: into halves of 8, 4, 2 or 1 of which i is in the lower
// and j in the upper. At each level both are factored about the first row of the lower half, where their factors are 2^-|G - r|; the
// product over all rows then holds what is wanted where rows part at this level, and elsewhere what nobody looks at.
template <int kDim>
__device__ __forceinline__ void diagonal_block(Shared<kDim>& s, bf16* attention, int block, uint32_t lane) {
  const int g = lane / 4, t = lane % 4;
  const int rows[2] = {block * kBlock + g, block * kBlock + g + 8};
  Accumulator q_sum[4][2] = {}, k_sum[4][2] = {};
#pragma unroll 1
  for (int base = 0; base < kDim; base += 16) {
    const Strip strip(s, rows, base, t);
#pragma unroll
    for (int level = 0; level < 4; level++) {
      const int size = 8 >> level;
      float a_q[2][4], a_k[2][4], b[2][4];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const bool is_lower = level == 0 ? r == 1 : (g & size) != 0;
        const int reference = (rows[r] & ~(2 * size - 1)) + size;
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const float2 about = *reinterpret_cast<const float2*>(&s.decay[reference][base + half * 8 + t * 2]);
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int at = half * 2 + e;
            const float factor = power2(-fabsf(strip.decay[r][at] - (e ? about.y : about.x)));
            const float decayed = strip.k[r][at] * factor;
            a_q[r][at] = is_lower ? strip.q[r][at] * factor : 0.0f;
            a_k[r][at] = is_lower ? decayed : 0.0f;
            b[r][at] = is_lower ? 0.0f : decayed;
          }
        }
      }
#pragma unroll
      for (int step = 0; step < 2; step++) {
#pragma unroll
        for (int n = 0; n < (level == 0 ? 1 : 2); n++) {
          mma_tf32(q_sum[level][n], a_q[0][step * 2], a_q[1][step * 2], a_q[0][step * 2 + 1], a_q[1][step * 2 + 1], b[n][step * 2], b[n][step * 2 + 1]);
          mma_tf32(k_sum[level][n], a_k[0][step * 2], a_k[1][step * 2], a_k[0][step * 2 + 1], a_k[1][step * 2 + 1], b[n][step * 2], b[n][step * 2 + 1]);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const int i = rows[r], j = block * kBlock + n * 8 + t * 2;
      float q[2], k[2];
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int apart = i ^ (j + e), at = r * 2 + e;
        const auto choose = [&](const Accumulator(&sum)[4][2]) {
          return apart >= 8 ? sum[0][n].x[at] : apart >= 4 ? sum[1][n].x[at] : apart >= 2 ? sum[2][n].x[at] : sum[3][n].x[at];
        };
        q[e] = apart == 0 ? s.diagonal[i] : choose(q_sum);
        k[e] = choose(k_sum);
      }
      store_query_pair(s, attention, i, j, q[0], q[1]);
      store_key_pair(s, i, j, k[0], k[1]);
    }
  }
}

// Block (I, J) below the diagonal, factored about the first row of I. One warp.
template <int kDim>
__device__ __forceinline__ void factored_block(Shared<kDim>& s, bf16* attention, int row_block, int column_block, uint32_t lane) {
  const int g = lane / 4, t = lane % 4;
  Accumulator q_sum[2] = {}, k_sum[2] = {};
  const float* reference = s.decay[row_block * kBlock];
#pragma unroll 2
  for (int base = 0; base < kDim; base += 16) {
    FragmentA q, k;
    FragmentB b[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int c = base + half * 8 + t * 2;
      const float2 r = *reinterpret_cast<const float2*>(reference + c);
#pragma unroll
      for (int lower = 0; lower < 2; lower++) {
        const int i = row_block * kBlock + g + lower * 8;
        const float2 d = *reinterpret_cast<const float2*>(&s.decay[i][c]);
        const float2 factor = {power2(d.x - r.x), power2(d.y - r.y)};
        const float2 qi = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&s.query[i][c]));
        const float2 ki = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&s.key[i][c]));
        q.x[half * 2 + lower] = pack(qi.x * factor.x, qi.y * factor.y);
        k.x[half * 2 + lower] = pack(ki.x * factor.x, ki.y * factor.y);
        // Column n = g of fragment `lower`, rows k = c, c + 1.
        const int j = column_block * kBlock + g + lower * 8;
        const float2 dj = *reinterpret_cast<const float2*>(&s.decay[j][c]);
        const float2 kj = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&s.key[j][c]));
        b[lower].x[half] = pack(kj.x * power2(r.x - dj.x), kj.y * power2(r.y - dj.y));
      }
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
      mma(q_sum[n], q, b[n]);
      mma(k_sum[n], k, b[n]);
    }
  }
#pragma unroll
  for (int n = 0; n < 2; n++) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int i = row_block * kBlock + g + r * 8, j = column_block * kBlock + n * 8 + t * 2;
      store_query_pair(s, attention, i, j, q_sum[n].x[r * 2], q_sum[n].x[r * 2 + 1]);
      store_key_pair(s, i, j, k_sum[n].x[r * 2], k_sum[n].x[r * 2 + 1]);
    }
  }
}

// The inverse of a diagonal block by forward substitution in float32; a lane has a column, lanes 16 to 31 do those of 0 to 15 again.
template <int kDim>
__device__ __forceinline__ void invert_block(Shared<kDim>& s, int block, uint32_t lane) {
  const int column = lane % kBlock, first = block * kBlock;
  float x[kBlock];
#pragma unroll
  for (int i = 0; i < kBlock; i++) {
    float sum = i == column ? 1.0f : 0.0f;
#pragma unroll
    for (int j = 0; j < i; j++) sum -= s.lower[first + i][first + j] * x[j];
    x[i] = sum;
  }
  if (lane < kBlock) {
#pragma unroll
    for (int i = 0; i < kBlock; i++) s.inverse[first + i][first + column] = x[i];
  }
}

// 16 x 8 of the product of two matrices in shared memory of pitch `kPitch`, over summed indices [from, to), multiples of 8.
template <int kPitch>
__device__ __forceinline__ Accumulator small_product(const float* left, const float* right, int from, int to, uint32_t lane) {
  const int g = lane / 4, t = lane % 4;
  Accumulator sum = {};
  for (int k = from; k < to; k += 8) {
    mma_tf32(sum, to_tf32(left[g * kPitch + k + t]), to_tf32(left[(g + 8) * kPitch + k + t]), to_tf32(left[g * kPitch + k + t + 4]),
             to_tf32(left[(g + 8) * kPitch + k + t + 4]), to_tf32(right[(k + t) * kPitch + g]), to_tf32(right[(k + t + 4) * kPitch + g]));
  }
  return sum;
}
template <int kPitch>
__device__ __forceinline__ void store_product(float* to, const Accumulator& sum, float sign, uint32_t lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    *reinterpret_cast<float2*>(to + (g + r * 8) * kPitch + t * 2) = make_float2(sign * sum.x[r * 2], sign * sum.x[r * 2 + 1]);
  }
}

// The block below two inverted diagonal blocks: -T22 (L21 T11), with the product in brackets above the diagonal. One warp.
template <int kDim>
__device__ __forceinline__ void join_pair(Shared<kDim>& s, int pair, uint32_t lane) {
  constexpr int kPitch = Shared<kDim>::kSquarePitch;
  const int first = pair * 2 * kBlock, second = first + kBlock;
#pragma unroll
  for (int n = 0; n < 2; n++) {
    const Accumulator sum = small_product<kPitch>(&s.lower[second][first], &s.inverse[first][first + n * 8], 0, kBlock, lane);
    store_product<kPitch>(&s.inverse[first][second + n * 8], sum, 1.0f, lane);
  }
  __syncwarp();
#pragma unroll
  for (int n = 0; n < 2; n++) {
    const Accumulator sum = small_product<kPitch>(&s.inverse[second][second], &s.inverse[first][second + n * 8], 0, kBlock, lane);
    store_product<kPitch>(&s.inverse[second][first + n * 8], sum, -1.0f, lane);
  }
}

// The same for the two halves of 32 rows: a warp has 16 x 8 of it.
template <int kDim>
__device__ __forceinline__ void join_halves(Shared<kDim>& s, uint32_t warp, uint32_t lane) {
  constexpr int kPitch = Shared<kDim>::kSquarePitch, kHalf = 2 * kBlock;
  const int m = warp / 4 * kBlock, n = warp % 4 * 8;
  // Columns from 16 on of the upper inverse begin in row 16; above lies the product of `join_pair`.
  const Accumulator sum = small_product<kPitch>(&s.lower[kHalf + m][0], &s.inverse[0][n], n < kBlock ? 0 : kBlock, kHalf, lane);
  store_product<kPitch>(&s.inverse[m][kHalf + n], sum, 1.0f, lane);
  __syncthreads();
  const Accumulator joined = small_product<kPitch>(&s.inverse[kHalf + m][kHalf], &s.inverse[0][kHalf + n], 0, m + kBlock, lane);
  store_product<kPitch>(&s.inverse[kHalf + m][n], joined, -1.0f, lane);
  __syncthreads();
}

// U = T (beta V) in warps 0 to 3, Wd = T (beta K e^G) in the others, a quarter of the channels each.
template <int kDim>
__device__ __forceinline__ void solve(const KdaParams& p, const Shared<kDim>& s, uint64_t entry, uint32_t warp, uint32_t lane) {
  constexpr int kTiles = kDim / 32;
  float* update = p.update + entry * (kDim / kUpdateColumns * kChunk * kUpdatePitch);
  bf16* erase = static_cast<bf16*>(p.erase) + entry * kChunk * (kDim + kRowPadding);
  const int g = lane / 4, t = lane % 4;
  const bool of_values = warp < kWarps / 2;
  const int first = warp % 4 * kTiles * 8;
  Accumulator sum[kBlocks][kTiles] = {};
#pragma unroll
  for (int k = 0; k < kChunk; k += 8) {
    float b[kTiles][2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int j = k + t + half * 4;
      const float factor = s.strength[j] * (of_values ? 1.0f : s.key_factor[j]);
#pragma unroll
      for (int n = 0; n < kTiles; n++) {
        const int c = first + n * 8 + g;
        const float x = of_values ? widen(s.query[j][c]) : widen(s.key[j][c]) * power2(s.decay[j][c]);
        b[n][half] = to_tf32(factor * x);
      }
    }
#pragma unroll
    for (int m = k / kBlock; m < kBlocks; m++) {
      const float* left = &s.inverse[m * kBlock][k];
      constexpr int kPitch = Shared<kDim>::kSquarePitch;
      const float a0 = to_tf32(left[g * kPitch + t]), a1 = to_tf32(left[(g + 8) * kPitch + t]);
      const float a2 = to_tf32(left[g * kPitch + t + 4]), a3 = to_tf32(left[(g + 8) * kPitch + t + 4]);
#pragma unroll
      for (int n = 0; n < kTiles; n++) mma_tf32(sum[m][n], a0, a1, a2, a3, b[n][0], b[n][1]);
    }
  }
#pragma unroll
  for (int m = 0; m < kBlocks; m++) {
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int i = m * kBlock + g + r * 8, column = first + n * 8 + t * 2;
        const float x = sum[m][n].x[r * 2], y = sum[m][n].x[r * 2 + 1];
        if (of_values) {
          *reinterpret_cast<float2*>(update + (column / kUpdateColumns * kChunk + i) * kUpdatePitch + column % kUpdateColumns) = make_float2(x, y);
        } else {
          *reinterpret_cast<uint32_t*>(erase + i * (kDim + kRowPadding) + column) = pack(x, y);
        }
      }
    }
  }
}

// Decayed queries and keys of rows first .. first + kRows - 1. One warp.
template <int kDim, int kRows>
__device__ __forceinline__ void leave_rows(const KdaParams& p, const Shared<kDim>& s, uint64_t entry, int first, uint32_t lane) {
  constexpr uint32_t kPitch = kDim + kRowPadding;
  bf16* query = static_cast<bf16*>(p.query) + entry * kChunk * kPitch;
  bf16* key = static_cast<bf16*>(p.key) + entry * kChunk * kPitch;
#pragma unroll
  for (int at = lane * 4; at < kRows * kDim; at += kWarp * 4) {
    const int i = first + at / kDim, c = at % kDim;
    const Quad g = read4(&s.decay[i][c]), end = read4(&s.decay[kChunk - 1][c]);
    Quad q = read4(&s.query[i][c]), k = read4(&s.key[i][c]);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      q.x[e] *= s.query_factor[i] * power2(g.x[e]);
      k.x[e] *= s.key_factor[i] * power2(end.x[e] - g.x[e]);
    }
    write4(query + i * kPitch + c, q);
    write4(key + i * kPitch + c, k);
  }
}

template <int kDim>
__device__ __forceinline__ void prepare(const KdaParams& p) {
  extern __shared__ uint4 dynamic[];
  Shared<kDim>& s = *reinterpret_cast<Shared<kDim>*>(dynamic);
  grid_dependency();
  const KdaChunk chunk = p.chunks[p.first_chunk + blockIdx.x];
  const uint32_t head = blockIdx.y;
  const uint32_t first = p.rows[chunk.row].first_token + chunk.first;
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint64_t entry = static_cast<uint64_t>(blockIdx.x) * p.heads + head;
  bf16* attention = static_cast<bf16*>(p.attention) + entry * kChunk * kAttentionPitch;
  if (threadIdx.x == 0) s.next = 0;
  load_chunk<kDim>(p, s, first, chunk.tokens, head);

  // The scan reads no block of Pqk above the diagonal. Diagonal blocks first; then each warp takes what is next: blocks (1,0) (2,0) (2,1)
  // (3,0) (3,1) (3,2), then rows to be left.
  if (warp < kBlocks) {
    if (is_mild<kDim>(s, warp, lane)) {
      mild_block<kDim>(s, attention, warp, lane);
    } else {
      diagonal_block<kDim>(s, attention, warp, lane);
    }
    __syncwarp();
    invert_block<kDim>(s, warp, lane);
  }
  constexpr int kFactored = kBlocks * (kBlocks - 1) / 2, kRows = 4;
  while (true) {
    uint32_t task = lane == 0 ? atomicAdd(&s.next, 1) : 0;
    task = __shfl_sync(~0u, task, 0);
    if (task >= kFactored + kChunk / kRows) break;
    if (task < kFactored) {
      const int row_block = task == 0 ? 1 : task < 3 ? 2 : 3;
      factored_block<kDim>(s, attention, row_block, task - row_block * (row_block - 1) / 2, lane);
    } else {
      leave_rows<kDim, kRows>(p, s, entry, (task - kFactored) * kRows, lane);
    }
  }
  for (uint32_t c = threadIdx.x; c < kDim; c += kThreads) p.decay[entry * kDim + c] = power2(s.decay[kChunk - 1][c]);
  // Once all queries have been used, values take their place; they are on their way before.
  constexpr int kTurns = kChunk * kDim / (4 * kThreads);
  const uint32_t width = p.heads * kDim;
  const bf16* from = static_cast<const bf16*>(p.convolved) + static_cast<uint64_t>(first) * 3 * width + 2 * width + head * kDim;
  uint2 values[kTurns];
#pragma unroll
  for (int turn = 0; turn < kTurns; turn++) {
    const uint32_t at = (threadIdx.x + turn * kThreads) * 4, i = at / kDim, c = at % kDim;
    values[turn] = {0, 0};
    if (i < chunk.tokens) values[turn] = *reinterpret_cast<const uint2*>(from + i * 3 * width + c);
  }
  __syncthreads();
#pragma unroll
  for (int turn = 0; turn < kTurns; turn++) {
    const uint32_t at = (threadIdx.x + turn * kThreads) * 4;
    *reinterpret_cast<uint2*>(&s.query[at / kDim][at % kDim]) = values[turn];
  }
  if (warp < 2) join_pair<kDim>(s, warp, lane);
  __syncthreads();
  join_halves<kDim>(s, warp, lane);
  solve<kDim>(p, s, entry, warp, lane);
}

#define KDA_CHUNK(dim)                                                                                             \
  extern "C" __global__ void __launch_bounds__(kThreads, 2) kda_chunk_bf16_##dim(const __grid_constant__ KdaParams p) { \
    prepare<dim>(p);                                                                                               \
  }
KDA_CHUNK(32)
KDA_CHUNK(64)
KDA_CHUNK(128)

// Size of the dynamic shared memory, as the launcher computes it.
static_assert(sizeof(Shared<128>) == 2 * 64 * 136 * 2 + 64 * 136 * 4 + 2 * 64 * 68 * 4 + 4 * 64 * 4 + 4 * 128 * 4 + 4, "launcher's size");
