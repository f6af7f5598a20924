// The sequential part of the chunked form: carries the state of a (row, head, 32 value channels) through the row's chunks.
// Bfloat16 operands on tensor cores with float32 sums and state, or float32 throughout. See README.md.
#include "common/mma.cuh"
#include "kda/inputs.cuh"

constexpr int kChunk = 64;
constexpr int kColumns = 32;  // value channels of a block
constexpr int kThreads = 128;        // of the float32 kernels
constexpr int kTensorThreads = 256;  // of those on tensor cores
constexpr int kStages = 3;

// Where a block works.
struct Place {
  KdaRow row;
  uint32_t head;
  uint32_t column;       // first value channel
  uint32_t first_chunk;
  uint32_t last_chunk;   // one past
};

__device__ __forceinline__ Place place(const KdaParams& p) {
  const uint32_t row = p.first_row + blockIdx.x;
  return {p.rows[row], blockIdx.y, blockIdx.z * kColumns, p.row_chunks[row], p.row_chunks[row + 1]};
}

// Float32: a thread owns one column; its warp owns 16 rows of Delta and O and a quarter of the state's rows.
template <int kDim, Fault kFault = Fault::kNone>
__device__ __forceinline__ void scan_fp32(const KdaParams& p) {
  __shared__ float state[kDim][kColumns];
  __shared__ float delta[kChunk][kColumns];
  grid_dependency();
  const Place at = place(p);
  const uint32_t column = threadIdx.x % kColumns, part = threadIdx.x / kColumns;
  constexpr int kParts = kThreads / kColumns;
  const uint32_t width = p.heads * kDim;
  const float* source = p.state + state_offset(p, at.row.read_slot, at.head) + at.column + column;
  for (int c = part; c < kDim; c += kParts) state[c][column] = source[c * kDim];
  __syncthreads();
  for (uint32_t chunk = at.first_chunk; chunk < at.last_chunk; chunk++) {
    const uint64_t entry = static_cast<uint64_t>(chunk - p.first_chunk) * p.heads + at.head;
    const float* erase = static_cast<const float*>(p.erase) + entry * kChunk * kDim;
    const float* query = static_cast<const float*>(p.query) + entry * kChunk * kDim;
    const float* key = static_cast<const float*>(p.key) + entry * kChunk * kDim;
    const float* attention = static_cast<const float*>(p.attention) + entry * kChunk * kChunk;
    const float* update = p.update + entry * kChunk * kDim + at.column + column;
    for (int i = part; i < kChunk; i += kParts) {
      float sum = update[i * kDim];
      for (int c = 0; c < kDim; c++) sum -= erase[i * kDim + c] * state[c][column];
      delta[i][column] = sum;
    }
    __syncthreads();
    const KdaChunk info = p.chunks[chunk];
    for (int i = part; i < info.tokens; i += kParts) {
      float sum = 0.0f;
      for (int c = 0; c < kDim; c++) sum += query[i * kDim + c] * state[c][column];
      for (int j = 0; j <= i; j++) sum += attention[i * kChunk + j] * delta[j][column];
      const uint64_t token = at.row.first_token + info.first + i;
      static_cast<float*>(p.mixed)[token * width + at.head * kDim + at.column + column] = sum;
    }
    __syncthreads();
    for (int c = part; c < kDim; c += kParts) {
      float sum = p.decay[entry * kDim + c] * state[c][column];
      for (int i = 0; i < kChunk; i++) sum += key[i * kDim + c] * delta[i][column];
      state[c][column] = kFault == Fault::kRoundedState ? rounded<bf16>(sum) : sum;
    }
    __syncthreads();
  }
  float* target = p.state + state_offset(p, at.row.write_slot, at.head) + at.column + column;
  for (int c = part; c < kDim; c += kParts) target[c * kDim] = state[c][column];
}

// One chunk's operands in shared memory.
template <int kDim>
struct Stage {
  static constexpr int kPitch = kDim + 8;
  static constexpr int kSquarePitch = kChunk + 8;
  bf16 erase[kChunk][kPitch];
  bf16 query[kChunk][kPitch];
  bf16 key[kChunk][kPitch];
  bf16 attention[kChunk][kSquarePitch];
  float update[kChunk][kColumns + 8];
  float decay[kDim];
};

template <int kDim>
struct ScanShared {
  static constexpr int kPitch = kColumns + 8;
  Stage<kDim> stages[kStages];
  bf16 state[kDim][kPitch];
  bf16 delta[kChunk][kPitch];
};

template <int kDim>
__device__ __forceinline__ void fetch(const KdaParams& p, Stage<kDim>& stage, uint64_t entry, uint32_t column) {
  const bf16* erase = static_cast<const bf16*>(p.erase) + entry * kChunk * kDim;
  const bf16* query = static_cast<const bf16*>(p.query) + entry * kChunk * kDim;
  const bf16* key = static_cast<const bf16*>(p.key) + entry * kChunk * kDim;
  const bf16* attention = static_cast<const bf16*>(p.attention) + entry * kChunk * kChunk;
  const float* update = p.update + entry * kChunk * kDim + column;
#pragma unroll
  for (int at = threadIdx.x * 8; at < kChunk * kDim; at += kTensorThreads * 8) {
    const int i = at / kDim, c = at % kDim;
    copy_async(&stage.erase[i][c], erase + at);
    copy_async(&stage.query[i][c], query + at);
    copy_async(&stage.key[i][c], key + at);
  }
#pragma unroll
  for (int at = threadIdx.x * 8; at < kChunk * kChunk; at += kTensorThreads * 8) {
    copy_async(&stage.attention[at / kChunk][at % kChunk], attention + at);
  }
#pragma unroll
  for (int at = threadIdx.x * 4; at < kChunk * kColumns; at += kTensorThreads * 4) {
    const int i = at / kColumns, c = at % kColumns;
    copy_async(&stage.update[i][c], update + i * kDim + c);
  }
  for (int c = threadIdx.x * 4; c < kDim; c += kTensorThreads * 4) copy_async(&stage.decay[c], p.decay + entry * kDim + c);
}

// Eight warps. A warp owns 16 rows and half of the columns of Delta and O, and 16 rows of the state, whose float32 values stay in its
// registers; the others see the state through its bfloat16 copy in shared memory.
template <int kDim>
__device__ __forceinline__ void scan_bf16(const KdaParams& p) {
  extern __shared__ uint4 dynamic[];
  ScanShared<kDim>& s = *reinterpret_cast<ScanShared<kDim>*>(dynamic);
  constexpr int kTiles = kColumns / 8;
  constexpr int kHalfTiles = kTiles / 2;
  static_assert(kDim <= 16 * kTensorThreads / kWarp, "a warp owns at most 16 rows of the state");
  grid_dependency();
  const Place at = place(p);
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int g = lane / 4, t = lane % 4;
  const uint32_t width = p.heads * kDim;
  const int first_row = warp * 16;             // of the state
  const bool owns_state = first_row < kDim;
  const int row = warp % 4 * 16;               // of Delta and O
  const int half_column = warp / 4 * kHalfTiles * 8;

  Accumulator state[kTiles];
  const uint64_t first_entry = static_cast<uint64_t>(at.first_chunk - p.first_chunk) * p.heads + at.head;
#pragma unroll
  for (int ahead = 0; ahead < kStages - 1; ahead++) {
    if (at.first_chunk + ahead < at.last_chunk) fetch<kDim>(p, s.stages[ahead], first_entry + ahead * p.heads, at.column);
    copy_commit();
  }
  const float* source = p.state + state_offset(p, at.row.read_slot, at.head) + at.column;
  auto each_state = [&](auto visit) {
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        visit(first_row + g + half * 8, n * 8 + t * 2, state[n].x[half * 2], state[n].x[half * 2 + 1]);
      }
    }
  };
  if (owns_state) {
    each_state([&](int c, int column, float& x, float& y) {
      const float2 pair = *reinterpret_cast<const float2*>(source + c * kDim + column);
      x = pair.x;
      y = pair.y;
      *reinterpret_cast<uint32_t*>(&s.state[c][column]) = pack(x, y);
    });
  }

  for (uint32_t chunk = at.first_chunk; chunk < at.last_chunk; chunk++) {
    const uint32_t turn = chunk - at.first_chunk;
    const Stage<kDim>& stage = s.stages[turn % kStages];
    const KdaChunk info = p.chunks[chunk];
    copy_wait<kStages - 2>();
    // Also: the copy of the state is complete, and every warp is done with the stage that is filled next.
    __syncthreads();
    if (chunk + kStages - 1 < at.last_chunk) {
      const uint64_t entry = static_cast<uint64_t>(chunk + kStages - 1 - p.first_chunk) * p.heads + at.head;
      fetch<kDim>(p, s.stages[(turn + kStages - 1) % kStages], entry, at.column);
    }
    copy_commit();

    // -Delta = Wd S - U, and O = Q S; the product is added, so the sign is turned twice.
    Accumulator delta[kHalfTiles], output[kHalfTiles] = {};
#pragma unroll
    for (int n = 0; n < kHalfTiles; n++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float2 u = *reinterpret_cast<const float2*>(&stage.update[row + g + half * 8][half_column + n * 8 + t * 2]);
        delta[n].x[half * 2] = -u.x;
        delta[n].x[half * 2 + 1] = -u.y;
      }
    }
#pragma unroll
    for (int base = 0; base < kDim; base += 16) {
      const FragmentA w = load_a(&stage.erase[row][base], Stage<kDim>::kPitch, lane);
      const FragmentA q = load_a(&stage.query[row][base], Stage<kDim>::kPitch, lane);
#pragma unroll
      for (int n = 0; n < kHalfTiles; n += 2) {
        FragmentB b[2];
        load_b_pair(b, &s.state[base][half_column + n * 8], ScanShared<kDim>::kPitch, lane);
        mma(delta[n], w, b[0]);
        mma(delta[n + 1], w, b[1]);
        mma(output[n], q, b[0]);
        mma(output[n + 1], q, b[1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kHalfTiles; n++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        *reinterpret_cast<uint32_t*>(&s.delta[row + g + half * 8][half_column + n * 8 + t * 2]) =
            pack(-delta[n].x[half * 2], -delta[n].x[half * 2 + 1]);
      }
    }
    __syncthreads();

    // S = Gamma S + K^T Delta, for the warp's rows of the state; then its copy, the old one of which was read before the barrier.
    if (owns_state) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float decay = stage.decay[first_row + g + half * 8];
#pragma unroll
        for (int n = 0; n < kTiles; n++) {
          state[n].x[half * 2] *= decay;
          state[n].x[half * 2 + 1] *= decay;
        }
      }
#pragma unroll
      for (int base = 0; base < kChunk; base += 16) {
        const FragmentA a = load_a_transposed(&stage.key[base][first_row], Stage<kDim>::kPitch, lane);
#pragma unroll
        for (int n = 0; n < kTiles; n += 2) {
          FragmentB b[2];
          load_b_pair(b, &s.delta[base][n * 8], ScanShared<kDim>::kPitch, lane);
          mma(state[n], a, b[0]);
          mma(state[n + 1], a, b[1]);
        }
      }
      each_state([&](int c, int column, float& x, float& y) {
        *reinterpret_cast<uint32_t*>(&s.state[c][column]) = pack(x, y);
      });
    }

    // O += Pqk Delta.
#pragma unroll
    for (int base = 0; base < kChunk; base += 16) {
      if (base > row) break;
      const FragmentA a = load_a(&stage.attention[row][base], Stage<kDim>::kSquarePitch, lane);
#pragma unroll
      for (int n = 0; n < kHalfTiles; n += 2) {
        FragmentB b[2];
        load_b_pair(b, &s.delta[base][half_column + n * 8], ScanShared<kDim>::kPitch, lane);
        mma(output[n], a, b[0]);
        mma(output[n + 1], a, b[1]);
      }
    }
    bf16* mixed = static_cast<bf16*>(p.mixed) + static_cast<uint64_t>(at.row.first_token + info.first) * width + at.head * kDim + at.column;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t i = row + g + half * 8;
      if (i < info.tokens) {
#pragma unroll
        for (int n = 0; n < kHalfTiles; n++) {
          *reinterpret_cast<uint32_t*>(mixed + static_cast<uint64_t>(i) * width + half_column + n * 8 + t * 2) =
              pack(output[n].x[half * 2], output[n].x[half * 2 + 1]);
        }
      }
    }
  }
  if (owns_state) {
    float* target = p.state + state_offset(p, at.row.write_slot, at.head) + at.column;
    each_state([&](int c, int column, float& x, float& y) {
      *reinterpret_cast<float2*>(target + c * kDim + column) = make_float2(x, y);
    });
  }
}

#define KDA_SCAN(dim)                                                                                               \
  extern "C" __global__ void __launch_bounds__(kThreads) kda_scan_fp32_##dim(const __grid_constant__ KdaParams p) { \
    scan_fp32<dim>(p);                                                                                              \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(kTensorThreads, 1) kda_scan_bf16_##dim(const __grid_constant__ KdaParams p) { \
    scan_bf16<dim>(p);                                                                                              \
  }
KDA_SCAN(32)
KDA_SCAN(64)
KDA_SCAN(128)

#ifdef PERIGEE_PLANTED_FAULTS
// Once a chunk: the state of the tokens within it exists nowhere.
#define KDA_SCAN_FAULT(dim)                                                                                                       \
  extern "C" __global__ void __launch_bounds__(kThreads) kda_scan_fp32_##dim##_rounded_state(const __grid_constant__ KdaParams p) { \
    scan_fp32<dim, Fault::kRoundedState>(p);                                                                                      \
  }
KDA_SCAN_FAULT(32)
KDA_SCAN_FAULT(64)
KDA_SCAN_FAULT(128)
#endif

// Size of the dynamic shared memory, as the launcher computes it.
static_assert(sizeof(ScanShared<128>) == 3 * ((3 * 64 * 136 + 64 * 72) * 2 + 64 * 40 * 4 + 128 * 4) + (128 + 64) * 40 * 2, "launcher's size");
