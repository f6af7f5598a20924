// The whole KDA mixer between its dense products for rows of one token: convolution, silu, norms, gate, state update, output
// norm and output gate in one kernel. One block of 256 threads a (row, head); the state passes through registers once, so the
// kernel is bound by reading and writing it. See README.md.
#include "kda/inputs.cuh"

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

template <class T, int kDim, Fault kFault = Fault::kNone>
__device__ __forceinline__ void decode(const KdaParams& p) {
  constexpr int kRowLanes = kDim / 4;               // lanes that hold one state row, four columns each
  constexpr int kWarpRows = kWarp / kRowLanes;      // state rows of a warp at a time
  constexpr int kStep = kWarps * kWarpRows;
  constexpr int kRows = kDim / kStep;               // state rows of a thread
  __shared__ float query[kDim], key[kDim], value[kDim], decay[kDim], gate[kDim];
  __shared__ float squares[2][kWarps];
  __shared__ alignas(16) float partial[2][kWarps][kDim];
  __shared__ float norm[kWarps];
  const KdaRow row = p.rows[blockIdx.x];
  // A row that only pads the step to a recorded size has no slots.
  if (row.tokens == 0) return;
  const uint32_t head = blockIdx.y;
  const uint32_t token = row.first_token;
  const uint32_t width = p.heads * kDim;
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t column = lane % kRowLanes * 4;
  const uint32_t first_row = warp * kWarpRows + lane / kRowLanes;

  // The state is asked for first; everything up to its use hides the wait.
  const float* source = p.state + state_offset(p, row.read_slot, head) + first_row * kDim + column;
  float4 state[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) state[r] = *reinterpret_cast<const float4*>(source + r * kStep * kDim);

  float q_squares = 0.0f, k_squares = 0.0f;
  for (uint32_t task = threadIdx.x; task < 5 * kDim; task += kThreads) {
    const uint32_t which = task / kDim, c = task % kDim;
    const uint32_t channel = head * kDim + c;
    if (which < 3) {
      const float x = convolved<T>(p, row, 0, which * width + channel);
      if (which == 0) {
        query[c] = x;
        q_squares += x * x;
      } else if (which == 1) {
        key[c] = x;
        k_squares += x * x;
      } else {
        value[c] = x;
      }
      // The tails of this channel are this thread's alone; ascending order reads an entry before it is overwritten.
      T* tails = static_cast<T*>(p.tails) + tail_offset(p, row.write_slot) + which * width + channel;
      for (uint32_t tail = 0; tail + 1 < p.taps; tail++) {
        const int at = static_cast<int>(tail + 1) - static_cast<int>(p.taps - 1);
        tails[static_cast<uint64_t>(tail) * 3 * width] = narrow<T>(conv_input<T>(p, row, at, which * width + channel));
      }
    } else if (which == 3) {
      decay[c] = expf(log_decay(p, token, channel));
    } else {
      gate[c] = p.o_norm[c] * output_gate<kFault>(p, token, channel);
    }
  }
  q_squares = warp_sum(q_squares);
  k_squares = warp_sum(k_squares);
  if (lane == 0) {
    squares[0][warp] = q_squares;
    squares[1][warp] = k_squares;
  }
  const float strength = write_strength<T>(p, token, head);
  __syncthreads();
  float q_total = 0.0f, k_total = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; w++) {
    q_total += squares[0][w];
    k_total += squares[1][w];
  }
  const float q_factor = p.query_scale / sqrtf(q_total + 1e-6f);
  const float k_factor = 1.0f / sqrtf(k_total + 1e-6f);

  // Sums over the rows of a warp, then over warps through shared memory.
  auto gather = [&](float4 sum, int which) {
#pragma unroll
    for (int distance = kRowLanes; distance < kWarp; distance *= 2) {
      sum.x += __shfl_xor_sync(~0u, sum.x, distance);
      sum.y += __shfl_xor_sync(~0u, sum.y, distance);
      sum.z += __shfl_xor_sync(~0u, sum.z, distance);
      sum.w += __shfl_xor_sync(~0u, sum.w, distance);
    }
    if (lane < kRowLanes) *reinterpret_cast<float4*>(&partial[which][warp][column]) = sum;
    __syncthreads();
  };
  float4 read = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const uint32_t c = first_row + r * kStep;
    const float d = decay[c], k = key[c] * k_factor;
    float4 seen = state[r];
    state[r].x *= d;
    state[r].y *= d;
    state[r].z *= d;
    state[r].w *= d;
    if (kFault != Fault::kDecayAfterRead) seen = state[r];
    read.x += k * seen.x;
    read.y += k * seen.y;
    read.z += k * seen.z;
    read.w += k * seen.w;
  }
  gather(read, 0);
  float4 delta = *reinterpret_cast<const float4*>(&value[column]);
#pragma unroll
  for (int w = 0; w < kWarps; w++) {
    const float4 part = *reinterpret_cast<const float4*>(&partial[0][w][column]);
    delta.x -= part.x;
    delta.y -= part.y;
    delta.z -= part.z;
    delta.w -= part.w;
  }
  delta = {delta.x * strength, delta.y * strength, delta.z * strength, delta.w * strength};
  float* target = p.state + state_offset(p, row.write_slot, head) + first_row * kDim + column;
  float4 out = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const uint32_t c = first_row + r * kStep;
    const float k = key[c] * k_factor, q = query[c] * q_factor;
    state[r].x += k * delta.x;
    state[r].y += k * delta.y;
    state[r].z += k * delta.z;
    state[r].w += k * delta.w;
    float4 kept = state[r];
    if (kFault == Fault::kRoundedState) kept = {rounded<bf16>(kept.x), rounded<bf16>(kept.y), rounded<bf16>(kept.z), rounded<bf16>(kept.w)};
    *reinterpret_cast<float4*>(target + r * kStep * kDim) = kept;
    out.x += q * state[r].x;
    out.y += q * state[r].y;
    out.z += q * state[r].z;
    out.w += q * state[r].w;
  }
  gather(out, 1);
  float output = 0.0f;
  if (threadIdx.x < kDim) {
#pragma unroll
    for (int w = 0; w < kWarps; w++) output += partial[1][w][threadIdx.x];
    output = rounded<T>(output);
  }
  const float sum = warp_sum(output * output);
  if (lane == 0) norm[warp] = sum;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; w++) total += norm[w];
  if (threadIdx.x < kDim) {
    const float scale = 1.0f / sqrtf(total / kDim + p.eps);
    static_cast<T*>(p.mixed)[static_cast<uint64_t>(token) * width + head * kDim + threadIdx.x] =
        narrow<T>(output * scale * gate[threadIdx.x]);
  }
}

#define KDA_DECODE(type, suffix, dim)                                                                                 \
  extern "C" __global__ void __launch_bounds__(kThreads, 2) kda_decode_##suffix##_##dim(const __grid_constant__ KdaParams p) { \
    decode<type, dim>(p);                                                                                             \
  }
KDA_DECODE(float, fp32, 32)
KDA_DECODE(float, fp32, 64)
KDA_DECODE(float, fp32, 128)
KDA_DECODE(bf16, bf16, 32)
KDA_DECODE(bf16, bf16, 64)
KDA_DECODE(bf16, bf16, 128)

#ifdef PERIGEE_PLANTED_FAULTS
#define KDA_DECODE_FAULT(suffix, fault, dim)                                                                                       \
  extern "C" __global__ void __launch_bounds__(kThreads, 2) kda_decode_fp32_##dim##_##suffix(const __grid_constant__ KdaParams p) { \
    decode<float, dim, fault>(p);                                                                                                  \
  }
#define KDA_DECODE_FAULTS(dim)                                         \
  KDA_DECODE_FAULT(decay_after_read, Fault::kDecayAfterRead, dim)      \
  KDA_DECODE_FAULT(rounded_state, Fault::kRoundedState, dim)           \
  KDA_DECODE_FAULT(silu_gate, Fault::kSiluGate, dim)
KDA_DECODE_FAULTS(32)
KDA_DECODE_FAULTS(64)
KDA_DECODE_FAULTS(128)
#endif
