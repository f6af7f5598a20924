// What the two kernels for rows of one token share: everything before the state is used (convolution, silu, norms, decay, gates)
// and after it (output norm, output gate). One block of 256 threads a (row, head). See README.md.
#pragma once
#include "kda/inputs.cuh"

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTaps = 4;  // of the published convolution; other widths are computed tap by tap

template <int kDim>
struct DecodeShared {
  float query[kDim], key[kDim], value[kDim], decay[kDim], gate[kDim];
  float squares[2][kWarps];
  alignas(16) float partial[kWarps][kDim];
  float norm[kWarps];
};

// How the block shares out a state [key][value]: four columns a lane, and a row in every kStep.
template <int kDim>
struct StateShare {
  static constexpr int kRowLanes = kDim / 4;           // lanes that hold one state row, four columns each
  static constexpr int kWarpRows = kWarp / kRowLanes;  // state rows of a warp at a time
  static constexpr int kStep = kWarps * kWarpRows;
  static constexpr int kRows = kDim / kStep;           // state rows of a thread
  __device__ __forceinline__ static uint32_t column() { return threadIdx.x % kWarp % kRowLanes * 4; }
  __device__ __forceinline__ static uint32_t first_row() { return threadIdx.x / kWarp * kWarpRows + threadIdx.x % kWarp / kRowLanes; }
};

// Factors that make unit vectors of queries, scale included, and keys; and the write strength.
struct Factors {
  float query;
  float key;
  float strength;
};

// Waits for the kernel ahead, and leaves what the state's update needs in shared memory, behind a barrier.
template <class T, int kDim, Fault kFault>
__device__ __forceinline__ Factors prepare(const KdaParams& p, const KdaRow& row, uint32_t head, DecodeShared<kDim>& s) {
  constexpr int kTasks = (5 * kDim + kThreads - 1) / kThreads;
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t token = row.first_token, width = p.heads * kDim, channels = 3 * width;
  // Three convolutions, the decay and the output gate of every channel; all that they read is asked for before the first use, and
  // what no kernel of the step but this one writes before the wait.
  float taps[kTasks][kTaps], inputs[kTasks][kTaps];
  float fixed[kTasks];  // dt_bias or the output norm's weight
  const float a_log = p.a_log[head];
#pragma unroll
  for (int j = 0; j < kTasks; j++) {
    const uint32_t task = threadIdx.x + j * kThreads, which = task / kDim, c = task % kDim;
    if (which < 3 && p.taps == kTaps) {
      const uint32_t channel = which * width + head * kDim + c;
      const T* tails = static_cast<const T*>(p.tails) + tail_offset(p, row.read_slot) + channel;
#pragma unroll
      for (int tap = 0; tap < kTaps; tap++) {
        taps[j][tap] = p.conv[tap * channels + channel];
        if (tap + 1 < kTaps) inputs[j][tap] = widen(tails[static_cast<uint64_t>(tap) * channels]);
      }
    } else if (which == 3) {
      fixed[j] = p.dt_bias[head * kDim + c];
    } else if (which == 4) {
      fixed[j] = p.o_norm[c];
    }
  }
  grid_wait();
#pragma unroll
  for (int j = 0; j < kTasks; j++) {
    const uint32_t task = threadIdx.x + j * kThreads, which = task / kDim, c = task % kDim;
    if (which < 3 && p.taps == kTaps) {
      inputs[j][kTaps - 1] = conv_input<T>(p, row, 0, which * width + head * kDim + c);
    } else if (which == 3 || which == 4) {
      inputs[j][0] = p.gates[static_cast<uint64_t>(token) * 2 * width + (which - 3) * width + head * kDim + c];
    }
  }
  const float strength = write_strength<T>(p, token, head);
  float q_squares = 0.0f, k_squares = 0.0f;
#pragma unroll
  for (int j = 0; j < kTasks; j++) {
    const uint32_t task = threadIdx.x + j * kThreads;
    if (task >= 5 * kDim) break;
    const uint32_t which = task / kDim, c = task % kDim;
    if (which < 3) {
      // The tails of this channel are this thread's alone; ascending order reads an entry before it is overwritten.
      const uint32_t channel = which * width + head * kDim + c;
      T* tails = static_cast<T*>(p.tails) + tail_offset(p, row.write_slot) + channel;
      float x;
      if (p.taps == kTaps) {
        float sum = 0.0f;
#pragma unroll
        for (int tap = 0; tap < kTaps; tap++) {
          sum += taps[j][tap] * inputs[j][tap];
          if (tap > 0) tails[static_cast<uint64_t>(tap - 1) * channels] = narrow<T>(inputs[j][tap]);
        }
        x = rounded<T>(silu(sum));
      } else {
        x = convolved<T>(p, row, 0, channel);
        for (uint32_t tail = 0; tail + 1 < p.taps; tail++) {
          const int at = static_cast<int>(tail + 1) - static_cast<int>(p.taps - 1);
          tails[static_cast<uint64_t>(tail) * channels] = narrow<T>(conv_input<T>(p, row, at, channel));
        }
      }
      if (which == 0) {
        s.query[c] = x;
        q_squares += x * x;
      } else if (which == 1) {
        s.key[c] = x;
        k_squares += x * x;
      } else {
        s.value[c] = x;
      }
    } else if (which == 3) {
      s.decay[c] = expf(log_decay_of(inputs[j][0] + fixed[j], a_log));
    } else {
      s.gate[c] = fixed[j] * output_gate_of<float, kFault>(inputs[j][0]);
    }
  }
  q_squares = warp_sum(q_squares);
  k_squares = warp_sum(k_squares);
  if (lane == 0) {
    s.squares[0][warp] = q_squares;
    s.squares[1][warp] = k_squares;
  }
  __syncthreads();
  float q_total = 0.0f, k_total = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; w++) {
    q_total += s.squares[0][w];
    k_total += s.squares[1][w];
  }
  return {p.query_scale / sqrtf(q_total + 1e-6f), 1.0f / sqrtf(k_total + 1e-6f), strength};
}

// Sums over the rows of a warp, then over warps through shared memory, behind a barrier.
template <int kDim>
__device__ __forceinline__ void gather(float4 sum, DecodeShared<kDim>& s) {
  using Share = StateShare<kDim>;
#pragma unroll
  for (int distance = Share::kRowLanes; distance < kWarp; distance *= 2) {
    sum.x += __shfl_xor_sync(~0u, sum.x, distance);
    sum.y += __shfl_xor_sync(~0u, sum.y, distance);
    sum.z += __shfl_xor_sync(~0u, sum.z, distance);
    sum.w += __shfl_xor_sync(~0u, sum.w, distance);
  }
  if (threadIdx.x % kWarp < Share::kRowLanes) *reinterpret_cast<float4*>(&s.partial[threadIdx.x / kWarp][Share::column()]) = sum;
  __syncthreads();
}

// What is written for the thread's columns, once the keys' reading of the state is gathered. A barrier follows, behind which sums may
// be gathered again.
template <int kDim>
__device__ __forceinline__ float4 correction(float strength, DecodeShared<kDim>& s) {
  const uint32_t column = StateShare<kDim>::column();
  float4 delta = *reinterpret_cast<const float4*>(&s.value[column]);
#pragma unroll
  for (int w = 0; w < kWarps; w++) {
    const float4 part = *reinterpret_cast<const float4*>(&s.partial[w][column]);
    delta.x -= part.x;
    delta.y -= part.y;
    delta.z -= part.z;
    delta.w -= part.w;
  }
  __syncthreads();
  return {delta.x * strength, delta.y * strength, delta.z * strength, delta.w * strength};
}

// Output norm and output gate, once the queries' reading of the state is gathered.
template <class T, int kDim>
__device__ __forceinline__ void finish(const KdaParams& p, const KdaRow& row, uint32_t head, DecodeShared<kDim>& s) {
  float output = 0.0f;
  if (threadIdx.x < kDim) {
#pragma unroll
    for (int w = 0; w < kWarps; w++) output += s.partial[w][threadIdx.x];
    output = rounded<T>(output);
  }
  const float sum = warp_sum(output * output);
  if (threadIdx.x % kWarp == 0) s.norm[threadIdx.x / kWarp] = sum;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; w++) total += s.norm[w];
  if (threadIdx.x < kDim) {
    const float scale = 1.0f / sqrtf(total / kDim + p.eps);
    const uint64_t to = static_cast<uint64_t>(row.first_token) * p.heads * kDim + head * kDim + threadIdx.x;
    static_cast<T*>(p.mixed)[to] = narrow<T>(output * scale * s.gate[threadIdx.x]);
  }
}
