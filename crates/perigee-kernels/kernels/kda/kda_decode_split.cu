// The step of kda_decode.cu with the product of the gates' low-rank halves, whose weights are read by every row: for a few of them. A head is
// shared out over a cluster of four blocks, 32 value channels each: one row's 32 heads are then read by 128 multiprocessors. A block has 32 channels of each convolution, of the decay and of the output gate; queries, keys and
// decays, which every block needs whole, go to all of them through distributed shared memory, as do the sums of squares of both norms.
#include "common/hopper.cuh"
#include "kda/inputs.cuh"

constexpr int kDim = 128;
constexpr int kBlocks = 4;                   // of a head
constexpr int kColumns = kDim / kBlocks;     // value channels of a block, and its share of all others
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTaps = 4;
constexpr int kGateLanes = 4;                // that share a gate channel's product
constexpr int kGateWarps = kColumns * kGateLanes / kWarp;  // of decays, then as many of output gates
constexpr int kRowLanes = kColumns / 4;      // that hold a state row, four columns each
constexpr int kStep = kThreads / kRowLanes;  // state rows of the block at a time
constexpr int kRows = kDim / kStep;          // of a thread
constexpr int kPieces = kDim / 8 / kGateLanes;

static_assert(kColumns == kWarp && 2 * kGateWarps == kWarps && kGateLanes == kBlocks, "a warp a convolution; a lane a block");

struct Shared {
  float query[kDim], key[kDim], decay[kDim];  // from all blocks
  float squares[2][kBlocks];                  // of queries and keys, from all blocks
  float norm[kBlocks];                        // squares of the outputs, from all blocks
  float value[kColumns], gate[kColumns];
  alignas(16) float read[kWarps][kColumns], out[kWarps][kColumns];
  uint64_t inputs, outputs;                   // what comes from all blocks has arrived
};
constexpr uint32_t kInputBytes = (3 * kDim + 2 * kBlocks) * 4;
constexpr uint32_t kOutputBytes = kBlocks * 4;

// The lane's part of the product of a weight row with the low-rank half of its gate: every fourth piece of eight.
__device__ __forceinline__ float gate_product(const uint4 (&weights)[kPieces], const uint4 (&low)[kPieces]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPieces; i++) {
    const uint32_t w[4] = {weights[i].x, weights[i].y, weights[i].z, weights[i].w};
    const uint32_t x[4] = {low[i].x, low[i].y, low[i].z, low[i].w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      sum += __uint_as_float(w[j] << 16) * __uint_as_float(x[j] << 16);
      sum += __uint_as_float(w[j] & 0xffff0000u) * __uint_as_float(x[j] & 0xffff0000u);
    }
  }
#pragma unroll
  for (int distance = 1; distance < kGateLanes; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  return sum;
}

// Sums over the state rows of a warp, for the other warps.
__device__ __forceinline__ void gather(float4 sum, float (&to)[kWarps][kColumns]) {
#pragma unroll
  for (int distance = kRowLanes; distance < kWarp; distance *= 2) {
    sum.x += __shfl_xor_sync(~0u, sum.x, distance);
    sum.y += __shfl_xor_sync(~0u, sum.y, distance);
    sum.z += __shfl_xor_sync(~0u, sum.z, distance);
    sum.w += __shfl_xor_sync(~0u, sum.w, distance);
  }
  const uint32_t lane = threadIdx.x % kWarp;
  if (lane < kRowLanes) *reinterpret_cast<float4*>(&to[threadIdx.x / kWarp][lane * 4]) = sum;
}

// blockIdx.x counts blocks of heads, kBlocks each; blockIdx.y rows.
extern "C" __global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kThreads, 2)
    kda_decode_split_bf16_128(const __grid_constant__ KdaParams p) {
  __shared__ Shared s;
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t head = blockIdx.x / kBlocks, rank = cluster_rank();
  // Rows come with the step's plan, and state and tails are this kernel's alone: none of them waits for the kernel ahead.
  const KdaRow row = p.rows[blockIdx.y];
  // A row that only pads the step to a recorded size has no slots.
  if (row.tokens == 0) {
    grid_wait();
    return;
  }
  const uint32_t width = p.heads * kDim, channels = 3 * width;
  const uint32_t first = head * kDim + rank * kColumns;  // of the block's channels, of width
  const uint32_t state_row = threadIdx.x / kRowLanes, column = threadIdx.x % kRowLanes * 4;
  const uint32_t place = state_row * kDim + rank * kColumns + column;
  const float* source = p.state + state_offset(p, row.read_slot, head) + place;
  float4 state[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) state[r] = *reinterpret_cast<const float4*>(source + r * kStep * kDim);

  // Decays by the lower warps, output gates by the upper ones, of which three have a convolution too.
  const bool is_output = warp >= kGateWarps;
  const uint32_t which = warp - kGateWarps;
  const bool convolves = is_output && which < 3;
  const uint32_t gate_channel = threadIdx.x / kGateLanes % kColumns, piece = threadIdx.x % kGateLanes;
  const uint4* gate_row = reinterpret_cast<const uint4*>(static_cast<const bf16*>(p.gate_weights) +
                                                         static_cast<uint64_t>((is_output ? width : 0) + first + gate_channel) * kDim);
  uint4 weights[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; i++) weights[i] = gate_row[i * kGateLanes + piece];
  const float fixed = is_output ? p.o_norm[rank * kColumns + gate_channel] : p.dt_bias[first + gate_channel];
  const float a_log = p.a_log[head];
  const uint32_t channel = which * width + first + lane;  // of a convolution
  float taps[kTaps], inputs[kTaps];
  if (convolves) {
    const bf16* tails = static_cast<const bf16*>(p.tails) + tail_offset(p, row.read_slot) + channel;
#pragma unroll
    for (int tap = 0; tap < kTaps; tap++) {
      taps[tap] = p.conv[tap * channels + channel];
      if (tap + 1 < kTaps) inputs[tap] = widen(tails[static_cast<uint64_t>(tap) * channels]);
    }
  }
  if (threadIdx.x == 0) {
    barrier_init(&s.inputs, 1);
    barrier_init(&s.outputs, 1);
    barrier_init_done();
    barrier_arrive_expecting(&s.inputs, kInputBytes);
    barrier_arrive_expecting(&s.outputs, kOutputBytes);
  }
  __syncwarp();
  cluster_begin();

  grid_wait();
  const bf16* projected = static_cast<const bf16*>(p.projected) + static_cast<uint64_t>(row.first_token) * p.projected_pitch;
  const uint4* low_row = reinterpret_cast<const uint4*>(projected + channels + (is_output ? kDim : 0));
  uint4 low[kPieces];
  if (convolves) inputs[kTaps - 1] = widen(projected[channel]);
#pragma unroll
  for (int i = 0; i < kPieces; i++) low[i] = low_row[i * kGateLanes + piece];
  const float strength = write_strength<bf16>(p, row.first_token, head);

  // Behind this all blocks of the cluster take what is stored to them.
  cluster_wait();
  if (!is_output) {
    const float decay = expf(log_decay_of(gate_product(weights, low) + fixed, a_log));
    store_at(address_at(&s.decay[rank * kColumns + gate_channel], piece), decay, address_at(&s.inputs, piece));
  } else {
    if (convolves) {
      float sum = 0.0f;
#pragma unroll
      for (int tap = 0; tap < kTaps; tap++) sum += taps[tap] * inputs[tap];
      const float x = rounded<bf16>(silu(sum));
      if (which == 2) {
        s.value[lane] = x;
      } else {
        const float* to = which == 0 ? s.query : s.key;
#pragma unroll
        for (int block = 0; block < kBlocks; block++) store_at(address_at(&to[rank * kColumns + lane], block), x, address_at(&s.inputs, block));
        const float squares = warp_sum(x * x);
        if (lane < kBlocks) store_at(address_at(&s.squares[which][rank], lane), squares, address_at(&s.inputs, lane));
      }
      // The tails of this channel are this thread's alone.
      bf16* tails = static_cast<bf16*>(p.tails) + tail_offset(p, row.write_slot) + channel;
#pragma unroll
      for (int tap = 1; tap < kTaps; tap++) tails[static_cast<uint64_t>(tap - 1) * channels] = narrow<bf16>(inputs[tap]);
    }
    const float gate = fixed * output_gate_of<float>(gate_product(weights, low));
    if (piece == 0) s.gate[gate_channel] = gate;
  }
  barrier_wait_cluster(&s.inputs, 0);
  // With few rows the product behind asks for weights while this kernel computes, not before it has read.
  grid_trigger();

  float q_total = 0.0f, k_total = 0.0f;
#pragma unroll
  for (int block = 0; block < kBlocks; block++) {
    q_total += s.squares[0][block];
    k_total += s.squares[1][block];
  }
  const float query_factor = p.query_scale / sqrtf(q_total + 1e-6f), key_factor = 1.0f / sqrtf(k_total + 1e-6f);
  float4 read = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const uint32_t c = state_row + r * kStep;
    const float d = s.decay[c], k = s.key[c] * key_factor;
    state[r].x *= d;
    state[r].y *= d;
    state[r].z *= d;
    state[r].w *= d;
    read.x += k * state[r].x;
    read.y += k * state[r].y;
    read.z += k * state[r].z;
    read.w += k * state[r].w;
  }
  gather(read, s.read);
  __syncthreads();
  float4 delta = *reinterpret_cast<const float4*>(&s.value[column]);
#pragma unroll
  for (int w = 0; w < kWarps; w++) {
    const float4 part = *reinterpret_cast<const float4*>(&s.read[w][column]);
    delta.x -= part.x;
    delta.y -= part.y;
    delta.z -= part.z;
    delta.w -= part.w;
  }
  delta = {delta.x * strength, delta.y * strength, delta.z * strength, delta.w * strength};
  float4 out = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const uint32_t c = state_row + r * kStep;
    const float k = s.key[c] * key_factor, q = s.query[c] * query_factor;
    state[r].x += k * delta.x;
    state[r].y += k * delta.y;
    state[r].z += k * delta.z;
    state[r].w += k * delta.w;
    out.x += q * state[r].x;
    out.y += q * state[r].y;
    out.z += q * state[r].z;
    out.w += q * state[r].w;
  }
  gather(out, s.out);
  __syncthreads();
  float output = 0.0f;
  if (warp == 0) {
#pragma unroll
    for (int w = 0; w < kWarps; w++) output += s.out[w][lane];
    output = rounded<bf16>(output);
    const float squares = warp_sum(output * output);
    if (lane < kBlocks) store_at(address_at(&s.norm[rank], lane), squares, address_at(&s.outputs, lane));
  }
  // The state on its way while the squares are on theirs.
  float* target = p.state + state_offset(p, row.write_slot, head) + place;
#pragma unroll
  for (int r = 0; r < kRows; r++) *reinterpret_cast<float4*>(target + r * kStep * kDim) = state[r];
  // The block's memory stays until all that is stored to it has arrived: its first warp waits for the last of that.
  if (warp > 0) return;
  barrier_wait_cluster(&s.outputs, 0);
  float total = 0.0f;
#pragma unroll
  for (int block = 0; block < kBlocks; block++) total += s.norm[block];
  const float scale = 1.0f / sqrtf(total / kDim + p.eps);
  static_cast<bf16*>(p.mixed)[static_cast<uint64_t>(row.first_token) * width + first + lane] = narrow<bf16>(output * scale * s.gate[lane]);
}
