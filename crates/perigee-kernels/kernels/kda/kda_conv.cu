// The ends of the chunked form: convolution and silu of all prefill tokens before it, the new tails, and the gated output norm
// after it. All bound by bytes.
#include "kda/inputs.cuh"

constexpr int kSpan = 16;  // tokens that a thread walks through

// Four inputs of the convolution of `channel` and its neighbours.
template <class T>
__device__ __forceinline__ Quad conv_inputs(const KdaParams& p, const KdaRow& row, int at, uint32_t channel) {
  if (at >= 0) return read4(static_cast<const T*>(p.projected) + static_cast<uint64_t>(row.first_token + at) * p.projected_pitch + channel);
  const uint32_t channels = 3 * p.heads * p.head_dim;
  const uint32_t tail = static_cast<uint32_t>(at + static_cast<int>(p.taps) - 1);
  return read4(static_cast<const T*>(p.tails) + tail_offset(p, row.read_slot) + static_cast<uint64_t>(tail) * channels + channel);
}

// The published width, four channels a thread: the last three inputs stay in registers.
template <class T>
__device__ __forceinline__ void convolve_four_taps(const KdaParams& p, const KdaRow& row, int first, uint32_t tokens, uint32_t channel, T* out) {
  const uint32_t channels = 3 * p.heads * p.head_dim;
  Quad x0 = conv_inputs<T>(p, row, first - 3, channel);
  Quad x1 = conv_inputs<T>(p, row, first - 2, channel);
  Quad x2 = conv_inputs<T>(p, row, first - 1, channel);
  const Quad w0 = read4(p.conv + channel), w1 = read4(p.conv + channels + channel);
  const Quad w2 = read4(p.conv + 2 * channels + channel), w3 = read4(p.conv + 3 * channels + channel);
  const T* from = static_cast<const T*>(p.projected) + static_cast<uint64_t>(row.first_token + first) * p.projected_pitch + channel;
  constexpr int kBatch = 8;
#pragma unroll
  for (uint32_t base = 0; base < kSpan; base += kBatch) {
    if (base >= tokens) return;
    // Loads of a batch before its stores, which the compiler could not reorder; beyond the chunk the last token again.
    Quad x3[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; i++) x3[i] = read4(from + min(base + i, tokens - 1) * p.projected_pitch);
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      Quad y;
#pragma unroll
      for (int e = 0; e < 4; e++) y.x[e] = silu_for<T>(w0.x[e] * x0.x[e] + w1.x[e] * x1.x[e] + w2.x[e] * x2.x[e] + w3.x[e] * x3[i].x[e]);
      if (base + i < tokens) write4(out + static_cast<uint64_t>(base + i) * channels, y);
      x0 = x1;
      x1 = x2;
      x2 = x3[i];
    }
  }
}

// One block a (chunk, 1,024 channels, 16 of its tokens).
template <class T>
__device__ __forceinline__ void convolve(const KdaParams& p) {
  grid_dependency();
  const KdaChunk chunk = p.chunks[blockIdx.x];
  const KdaRow row = p.rows[chunk.row];
  const uint32_t channels = 3 * p.heads * p.head_dim;
  const uint32_t channel = (blockIdx.y * blockDim.x + threadIdx.x) * 4;
  const uint32_t before = blockIdx.z * kSpan;  // tokens of the chunk
  if (channel >= channels || before >= chunk.tokens) return;
  const uint32_t first = chunk.first + before, tokens = min(static_cast<uint32_t>(kSpan), chunk.tokens - before);
  T* out = static_cast<T*>(p.convolved) + static_cast<uint64_t>(row.first_token + first) * channels + channel;
  if (p.taps == 4) return convolve_four_taps(p, row, static_cast<int>(first), tokens, channel, out);
  for (uint32_t at = 0; at < tokens; at++) {
    for (uint32_t e = 0; e < 4; e++) out[static_cast<uint64_t>(at) * channels + e] = narrow<T>(convolved<T>(p, row, first + at, channel + e));
  }
}

// One block a (row, 256 channels), after `convolve` has read the old tails. Ascending order reads an entry before it is
// overwritten.
template <class T>
__device__ __forceinline__ void move_tails(const KdaParams& p) {
  grid_dependency();
  const KdaRow row = p.rows[blockIdx.x];
  const uint32_t channels = 3 * p.heads * p.head_dim;
  const uint32_t channel = blockIdx.y * blockDim.x + threadIdx.x;
  if (channel >= channels) return;
  T* tails = static_cast<T*>(p.tails) + tail_offset(p, row.write_slot);
  for (uint32_t tail = 0; tail + 1 < p.taps; tail++) {
    const int at = static_cast<int>(row.tokens + tail) - static_cast<int>(p.taps - 1);
    tails[static_cast<uint64_t>(tail) * channels + channel] = narrow<T>(conv_input<T>(p, row, at, channel));
  }
}

// One block a chunk, one warp a (token, head) at a time, in place: o is normed, weighted and gated.
template <class T, Fault kFault = Fault::kNone>
__device__ __forceinline__ void gate_output(const KdaParams& p) {
  grid_dependency();
  const KdaChunk chunk = p.chunks[blockIdx.x];
  const uint32_t first = p.rows[chunk.row].first_token + chunk.first;
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t warps = gridDim.y * (blockDim.x / kWarp);
  const uint32_t width = p.heads * p.head_dim, pairs = chunk.tokens * p.heads;
  const uint32_t warp = blockIdx.y * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  const auto scaled = [&](Quad& x, const Quad& weight, const Quad& gate, float scale) {
#pragma unroll
    for (int e = 0; e < 4; e++) x.x[e] *= scale * weight.x[e] * output_gate_of<T, kFault>(gate.x[e]);
  };
  const auto scale_of = [&](float squares) { return 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(p.head_dim) + p.eps); };
  if (p.head_dim == kWarp * 4) {
    // The published width: all of what a lane has of a pair, and of two pairs, is asked for at once.
    constexpr int kBatch = sizeof(T) == 2 ? 2 : 1;
    const Quad weight = read4(p.o_norm + lane * 4);
    for (uint32_t base = warp; base < pairs; base += warps * kBatch) {
      Quad x[kBatch], gate[kBatch];
      T* place[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; i++) {
        const uint32_t pair = base + i * warps < pairs ? base + i * warps : base;
        const uint64_t token = first + pair / p.heads;
        const uint32_t channel = pair % p.heads * p.head_dim + lane * 4;
        place[i] = static_cast<T*>(p.mixed) + token * width + channel;
        x[i] = read4(place[i]);
        gate[i] = read4(p.gates + token * 2 * width + width + channel);
      }
#pragma unroll
      for (int i = 0; i < kBatch; i++) {
        float squares = 0.0f;
#pragma unroll
        for (int e = 0; e < 4; e++) squares += x[i].x[e] * x[i].x[e];
        scaled(x[i], weight, gate[i], scale_of(squares));
        if (base + i * warps < pairs) write4(place[i], x[i]);
      }
    }
    return;
  }
  for (uint32_t pair = warp; pair < pairs; pair += warps) {
    const uint64_t token = first + pair / p.heads;
    const uint32_t channel = pair % p.heads * p.head_dim;
    T* row = static_cast<T*>(p.mixed) + token * width + channel;
    const float* gates = p.gates + token * 2 * width + width + channel;
    float squares = 0.0f;
    for (uint32_t i = lane * 4; i < p.head_dim; i += kWarp * 4) {
      const Quad x = read4(row + i);
#pragma unroll
      for (int e = 0; e < 4; e++) squares += x.x[e] * x.x[e];
    }
    const float scale = scale_of(squares);
    for (uint32_t i = lane * 4; i < p.head_dim; i += kWarp * 4) {
      Quad x = read4(row + i);
      scaled(x, read4(p.o_norm + i), read4(gates + i), scale);
      write4(row + i, x);
    }
  }
}

extern "C" __global__ void __launch_bounds__(256) kda_conv_fp32(const __grid_constant__ KdaParams p) { convolve<float>(p); }
extern "C" __global__ void __launch_bounds__(256) kda_conv_bf16(const __grid_constant__ KdaParams p) { convolve<bf16>(p); }
extern "C" __global__ void __launch_bounds__(256) kda_tails_fp32(const __grid_constant__ KdaParams p) { move_tails<float>(p); }
extern "C" __global__ void __launch_bounds__(256) kda_tails_bf16(const __grid_constant__ KdaParams p) { move_tails<bf16>(p); }
extern "C" __global__ void __launch_bounds__(256) kda_gate_fp32(const __grid_constant__ KdaParams p) { gate_output<float>(p); }
extern "C" __global__ void __launch_bounds__(256) kda_gate_bf16(const __grid_constant__ KdaParams p) { gate_output<bf16>(p); }
#ifdef PERIGEE_PLANTED_FAULTS
extern "C" __global__ void __launch_bounds__(256) kda_gate_fp32_silu_gate(const __grid_constant__ KdaParams p) { gate_output<float, Fault::kSiluGate>(p); }
#endif
