// The sequential part of the chunked form: carries the state of a (row, head, 32 value channels) through the row's chunks.
// Bfloat16 operands on tensor cores with float32 sums and state, or float32 throughout. See README.md.
#include "common/hopper.cuh"
#include "kda/inputs.cuh"

constexpr int kChunk = 64;
constexpr int kColumns = 32;  // value channels of a block
constexpr int kThreads = 128;        // of the float32 kernels
constexpr int kConsumerWarps = 8;    // of those on tensor cores, and a warp that copies
constexpr int kTensorThreads = (kConsumerWarps + 1) * kWarp;
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

// One chunk's operands in shared memory, laid out as in the workspace.
template <int kDim>
struct Stage {
  static constexpr int kPitch = kDim + kRowPadding;
  bf16 erase[kChunk][kPitch];
  bf16 query[kChunk][kPitch];
  bf16 key[kChunk][kPitch];
  bf16 attention[kChunk][kAttentionPitch];
  float update[kChunk][kUpdatePitch];
  float decay[kDim];
};

template <int kDim>
struct ScanShared {
  static constexpr int kPitch = kColumns + 8;
  Stage<kDim> stages[kStages];
  bf16 state[kDim][kPitch];
  bf16 delta[kChunk][kPitch];
  uint64_t full[kStages];
};

// The warps that multiply, without the one that copies.
__device__ __forceinline__ void consumers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kConsumerWarps * kWarp) : "memory"); }

// Blocks of a cluster: of four, no device of 132 multiprocessors has room for 32 at once, one for each head.
template <int kDim>
constexpr int kCluster = kDim > kColumns ? 2 : 1;

// One thread asks for a chunk. All that the blocks of the cluster share comes once, an array by each of them in turn.
template <int kDim>
__device__ __forceinline__ void ask(const KdaParams& p, ScanShared<kDim>& s, const Place& at, uint32_t chunk) {
  constexpr uint16_t kAll = (1 << kCluster<kDim>) - 1;
  constexpr uint64_t kRows = kChunk * Stage<kDim>::kPitch, kPairs = kChunk * kAttentionPitch, kUpdate = kChunk * kUpdatePitch;
  const uint32_t rank = cluster_rank(), turn = chunk - at.first_chunk;
  Stage<kDim>& stage = s.stages[turn % kStages];
  uint64_t* full = &s.full[turn % kStages];
  const uint64_t entry = static_cast<uint64_t>(chunk - p.first_chunk) * p.heads + at.head;
  barrier_arrive_expecting(full, sizeof(stage));
  if (0 % kCluster<kDim> == rank) copy_piece_to_all(stage.erase, static_cast<const bf16*>(p.erase) + entry * kRows, sizeof(stage.erase), full, kAll);
  if (1 % kCluster<kDim> == rank) copy_piece_to_all(stage.query, static_cast<const bf16*>(p.query) + entry * kRows, sizeof(stage.query), full, kAll);
  if (2 % kCluster<kDim> == rank) copy_piece_to_all(stage.key, static_cast<const bf16*>(p.key) + entry * kRows, sizeof(stage.key), full, kAll);
  if (3 % kCluster<kDim> == rank) {
    copy_piece_to_all(stage.attention, static_cast<const bf16*>(p.attention) + entry * kPairs, sizeof(stage.attention), full, kAll);
    copy_piece_to_all(stage.decay, p.decay + entry * kDim, sizeof(stage.decay), full, kAll);
  }
  copy_piece(stage.update, p.update + (entry * (kDim / kColumns) + at.column / kColumns) * kUpdate, sizeof(stage.update), full);
}

// The warp that copies, kStages chunks ahead. The cluster's barrier has a phase for each chunk, which ends when all threads of its blocks
// have read the chunk: the race checker follows that, and not an arrival of one lane for its warp.
template <int kDim>
__device__ __forceinline__ void fetch(const KdaParams& p, ScanShared<kDim>& s, const Place& at) {
#pragma unroll 1
  for (uint32_t chunk = at.first_chunk; chunk < at.last_chunk + kStages; chunk++) {
    if (chunk >= at.first_chunk + kStages) {
      cluster_arrive();
      cluster_wait();
    }
    if (threadIdx.x % kWarp == 0 && chunk < at.last_chunk) ask(p, s, at, chunk);
    __syncwarp();
  }
}

// Eight warps. A warp owns 16 rows and half of the columns of Delta and O, and 16 rows of the state, whose float32 values stay in its
// registers; the others see the state through its bfloat16 copy in shared memory.
template <int kDim>
__device__ __forceinline__ void advance(const KdaParams& p, ScanShared<kDim>& s, const Place& at) {
  constexpr int kTiles = kColumns / 8;
  constexpr int kHalfTiles = kTiles / 2;
  static_assert(kDim <= 16 * kConsumerWarps, "a warp owns at most 16 rows of the state");
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int g = lane / 4, t = lane % 4;
  const uint32_t width = p.heads * kDim;
  const int first_row = warp * 16;             // of the state
  const bool owns_state = first_row < kDim;
  const int row = warp % 4 * 16;               // of Delta and O
  const int half_column = warp / 4 * kHalfTiles * 8;

  Accumulator state[kTiles];
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
    barrier_wait(&s.full[turn % kStages], turn / kStages & 1);
    // The copy of the state is complete.
    consumers_sync();

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
    consumers_sync();

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
      const FragmentA a = load_a(&stage.attention[row][base], kAttentionPitch, lane);
#pragma unroll
      for (int n = 0; n < kHalfTiles; n += 2) {
        FragmentB b[2];
        load_b_pair(b, &s.delta[base][half_column + n * 8], ScanShared<kDim>::kPitch, lane);
        mma(output[n], a, b[0]);
        mma(output[n + 1], a, b[1]);
      }
    }
    // This warp is done with what was copied.
    __syncwarp();
    if (turn > 0) cluster_wait();
    cluster_arrive();
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
  if (at.first_chunk < at.last_chunk) cluster_wait();
  if (owns_state) {
    float* target = p.state + state_offset(p, at.row.write_slot, at.head) + at.column;
    each_state([&](int c, int column, float& x, float& y) {
      *reinterpret_cast<float2*>(target + c * kDim + column) = make_float2(x, y);
    });
  }
}

template <int kDim>
__device__ __forceinline__ void scan_bf16(const KdaParams& p) {
  extern __shared__ uint4 dynamic[];
  ScanShared<kDim>& s = *reinterpret_cast<ScanShared<kDim>*>(dynamic);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; stage++) barrier_init(&s.full[stage], 1);
    barrier_init_done();
  }
  cluster_sync();
  grid_dependency();
  const Place at = place(p);
  if (threadIdx.x / kWarp == kConsumerWarps) {
    fetch<kDim>(p, s, at);
  } else {
    advance<kDim>(p, s, at);
  }
  // The other blocks copy to this one's memory until they are done.
  cluster_sync();
}

#define KDA_SCAN(dim)                                                                                               \
  extern "C" __global__ void __launch_bounds__(kThreads) kda_scan_fp32_##dim(const __grid_constant__ KdaParams p) { \
    scan_fp32<dim>(p);                                                                                              \
  }                                                                                                                 \
  extern "C" __global__ void __cluster_dims__(1, 1, kCluster<dim>) __launch_bounds__(kTensorThreads, 1)            \
      kda_scan_bf16_##dim(const __grid_constant__ KdaParams p) {                                                    \
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
static_assert(sizeof(ScanShared<128>) == 3 * ((3 * 64 * 136 + 64 * 72) * 2 + 64 * 40 * 4 + 128 * 4) + (128 + 64) * 40 * 2 + 24, "launcher's size");
