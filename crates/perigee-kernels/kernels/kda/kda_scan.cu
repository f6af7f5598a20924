// The sequential part of the chunked form: carries the state of a (row, head, 32 value channels) through the row's chunks.
// Bfloat16 operands on tensor cores with float32 sums and state, or float32 throughout. See README.md.
#include "common/mma.cuh"
#include "kda/inputs.cuh"

constexpr int kChunk = 64;
constexpr int kColumns = 32;  // value channels of a block
constexpr int kThreads = 128;

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
};

template <int kDim>
struct ScanShared {
  static constexpr int kPitch = kColumns + 8;
  Stage<kDim> stages[2];
  bf16 state[kDim][kPitch];
  bf16 delta[kChunk][kPitch];
};

template <int kDim>
__device__ __forceinline__ void fetch(const KdaParams& p, Stage<kDim>& stage, uint64_t entry) {
  const bf16* erase = static_cast<const bf16*>(p.erase) + entry * kChunk * kDim;
  const bf16* query = static_cast<const bf16*>(p.query) + entry * kChunk * kDim;
  const bf16* key = static_cast<const bf16*>(p.key) + entry * kChunk * kDim;
  const bf16* attention = static_cast<const bf16*>(p.attention) + entry * kChunk * kChunk;
  for (int at = threadIdx.x * 8; at < kChunk * kDim; at += kThreads * 8) {
    const int i = at / kDim, c = at % kDim;
    copy_async(&stage.erase[i][c], erase + at);
    copy_async(&stage.query[i][c], query + at);
    copy_async(&stage.key[i][c], key + at);
  }
  for (int at = threadIdx.x * 8; at < kChunk * kChunk; at += kThreads * 8) {
    copy_async(&stage.attention[at / kChunk][at % kChunk], attention + at);
  }
  copy_commit();
}

// Four warps. A warp owns 16 rows of Delta and O, and kDim / 4 rows of the state, whose float32 values stay in its registers;
// the others see the state through its bfloat16 copy in shared memory.
template <int kDim>
__device__ __forceinline__ void scan_bf16(const KdaParams& p) {
  extern __shared__ uint4 dynamic[];
  ScanShared<kDim>& s = *reinterpret_cast<ScanShared<kDim>*>(dynamic);
  constexpr int kTiles = kColumns / 8;
  constexpr int kStateTiles = kDim >= 64 ? kDim / 64 : 1;  // blocks of 16 state rows of a warp
  const Place at = place(p);
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int g = lane / 4, t = lane % 4;
  const uint32_t width = p.heads * kDim;
  const int first_row = warp * kStateTiles * 16;
  const bool owns_state = first_row < kDim;  // with 32 channels two of the four warps own none

  Accumulator state[kStateTiles][kTiles];
  const uint64_t first_entry = static_cast<uint64_t>(at.first_chunk - p.first_chunk) * p.heads + at.head;
  fetch<kDim>(p, s.stages[0], first_entry);
  const float* source = p.state + state_offset(p, at.row.read_slot, at.head) + at.column;
  auto each_state = [&](auto visit) {
#pragma unroll
    for (int m = 0; m < kStateTiles; m++) {
#pragma unroll
      for (int n = 0; n < kTiles; n++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          visit(first_row + m * 16 + g + half * 8, n * 8 + t * 2, state[m][n].x[half * 2], state[m][n].x[half * 2 + 1]);
        }
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
    const uint64_t entry = static_cast<uint64_t>(chunk - p.first_chunk) * p.heads + at.head;
    Stage<kDim>& stage = s.stages[(chunk - at.first_chunk) % 2];
    // The other stage was last read before the barrier at the end of the previous turn.
    if (chunk + 1 < at.last_chunk) {
      fetch<kDim>(p, s.stages[(chunk + 1 - at.first_chunk) % 2], entry + p.heads);
    } else {
      copy_commit();
    }
    Accumulator delta[kTiles], output[kTiles];
    const float* update = p.update + entry * kChunk * kDim + at.column;
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float2 u = *reinterpret_cast<const float2*>(update + (warp * 16 + g + half * 8) * kDim + n * 8 + t * 2);
        // The product below is added, so the sign is turned twice.
        delta[n].x[half * 2] = -u.x;
        delta[n].x[half * 2 + 1] = -u.y;
        output[n].x[half * 2] = 0.0f;
        output[n].x[half * 2 + 1] = 0.0f;
      }
    }
    float decay[kStateTiles][2];
    if (owns_state) {
#pragma unroll
      for (int m = 0; m < kStateTiles; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) decay[m][half] = p.decay[entry * kDim + first_row + m * 16 + g + half * 8];
      }
    }
    copy_wait<1>();
    __syncthreads();

    // -Delta = Wd S - U, and O = Q S, for the warp's 16 rows.
#pragma unroll
    for (int base = 0; base < kDim; base += 16) {
      const FragmentA w = load_a(&stage.erase[warp * 16][base], Stage<kDim>::kPitch, lane);
      const FragmentA q = load_a(&stage.query[warp * 16][base], Stage<kDim>::kPitch, lane);
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        FragmentB b[2];
        load_b_pair(b, &s.state[base][n * 8], ScanShared<kDim>::kPitch, lane);
        mma(delta[n], w, b[0]);
        mma(delta[n + 1], w, b[1]);
        mma(output[n], q, b[0]);
        mma(output[n + 1], q, b[1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        *reinterpret_cast<uint32_t*>(&s.delta[warp * 16 + g + half * 8][n * 8 + t * 2]) =
            pack(-delta[n].x[half * 2], -delta[n].x[half * 2 + 1]);
      }
    }
    __syncthreads();

    // O += Pqk Delta.
    for (int base = 0; base <= warp * 16; base += 16) {
      const FragmentA a = load_a(&stage.attention[warp * 16][base], Stage<kDim>::kSquarePitch, lane);
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        FragmentB b[2];
        load_b_pair(b, &s.delta[base][n * 8], ScanShared<kDim>::kPitch, lane);
        mma(output[n], a, b[0]);
        mma(output[n + 1], a, b[1]);
      }
    }
    const KdaChunk info = p.chunks[chunk];
    bf16* mixed = static_cast<bf16*>(p.mixed) + static_cast<uint64_t>(at.row.first_token + info.first) * width + at.head * kDim + at.column;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t i = warp * 16 + g + half * 8;
      if (i < info.tokens) {
#pragma unroll
        for (int n = 0; n < kTiles; n++) {
          *reinterpret_cast<uint32_t*>(mixed + static_cast<uint64_t>(i) * width + n * 8 + t * 2) =
              pack(output[n].x[half * 2], output[n].x[half * 2 + 1]);
        }
      }
    }

    // S = Gamma S + K^T Delta, for the warp's rows of the state; then its copy.
    if (owns_state) {
#pragma unroll
      for (int m = 0; m < kStateTiles; m++) {
#pragma unroll
        for (int n = 0; n < kTiles; n++) {
#pragma unroll
          for (int e = 0; e < 4; e++) state[m][n].x[e] *= decay[m][e / 2];
        }
      }
#pragma unroll
      for (int base = 0; base < kChunk; base += 16) {
        FragmentB b[kTiles];
#pragma unroll
        for (int n = 0; n < kTiles; n += 2) {
          FragmentB pair[2];
          load_b_pair(pair, &s.delta[base][n * 8], ScanShared<kDim>::kPitch, lane);
          b[n] = pair[0];
          b[n + 1] = pair[1];
        }
#pragma unroll
        for (int m = 0; m < kStateTiles; m++) {
          const FragmentA a = load_a_transposed(&stage.key[base][first_row + m * 16], Stage<kDim>::kPitch, lane);
#pragma unroll
          for (int n = 0; n < kTiles; n++) mma(state[m][n], a, b[n]);
        }
      }
      // All warps have read the old copy before the barrier above.
      each_state([&](int c, int column, float& x, float& y) {
        *reinterpret_cast<uint32_t*>(&s.state[c][column]) = pack(x, y);
      });
    }
    __syncthreads();
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
  extern "C" __global__ void __launch_bounds__(kThreads, 1) kda_scan_bf16_##dim(const __grid_constant__ KdaParams p) { \
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
static_assert(sizeof(ScanShared<128>) == 2 * (3 * 64 * 136 + 64 * 72) * 2 + (128 + 64) * 40 * 2, "launcher's size");
