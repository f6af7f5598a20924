// The ends of the chunked form: convolution and silu of all prefill tokens before it, the new tails, and the gated output norm
// after it. All bound by bytes.
#include "kda/inputs.cuh"

// One block a (chunk, 256 channels); a thread walks its channel through the chunk.
template <class T>
__device__ __forceinline__ void convolve(const KdaParams& p) {
  const KdaChunk chunk = p.chunks[blockIdx.x];
  const KdaRow row = p.rows[chunk.row];
  const uint32_t channels = 3 * p.heads * p.head_dim;
  const uint32_t channel = blockIdx.y * blockDim.x + threadIdx.x;
  if (channel >= channels) return;
  T* out = static_cast<T*>(p.convolved) + static_cast<uint64_t>(row.first_token + chunk.first) * channels + channel;
  if (p.taps != 4) {
    for (uint32_t at = 0; at < chunk.tokens; at++) {
      out[static_cast<uint64_t>(at) * channels] = narrow<T>(convolved<T>(p, row, chunk.first + at, channel));
    }
    return;
  }
  // The published width: the last three inputs stay in registers.
  const int first = static_cast<int>(chunk.first);
  float x0 = conv_input<T>(p, row, first - 3, channel);
  float x1 = conv_input<T>(p, row, first - 2, channel);
  float x2 = conv_input<T>(p, row, first - 1, channel);
  const float w0 = p.conv[channel], w1 = p.conv[channels + channel];
  const float w2 = p.conv[2 * channels + channel], w3 = p.conv[3 * channels + channel];
  constexpr int kBatch = 8;
  for (uint32_t base = 0; base < chunk.tokens; base += kBatch) {
    // Loads of a batch before its stores, which the compiler could not reorder; beyond the chunk the last token again.
    float x3[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; i++) x3[i] = conv_input<T>(p, row, first + static_cast<int>(min(base + i, chunk.tokens - 1)), channel);
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      const float sum = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3[i];
      if (base + i < chunk.tokens) out[static_cast<uint64_t>(base + i) * channels] = narrow<T>(silu(sum));
      x0 = x1;
      x1 = x2;
      x2 = x3[i];
    }
  }
}

// One block a (row, 256 channels), after `convolve` has read the old tails. Ascending order reads an entry before it is
// overwritten.
template <class T>
__device__ __forceinline__ void move_tails(const KdaParams& p) {
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
  const KdaChunk chunk = p.chunks[blockIdx.x];
  const uint32_t first = p.rows[chunk.row].first_token + chunk.first;
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t warps = gridDim.y * (blockDim.x / kWarp);
  for (uint32_t pair = blockIdx.y * (blockDim.x / kWarp) + threadIdx.x / kWarp; pair < chunk.tokens * p.heads; pair += warps) {
    const uint32_t token = first + pair / p.heads;
    const uint32_t head = pair % p.heads;
    T* row = static_cast<T*>(p.mixed) + static_cast<uint64_t>(token) * p.heads * p.head_dim + head * p.head_dim;
    float squares = 0.0f;
    for (uint32_t i = lane; i < p.head_dim; i += kWarp) {
      const float x = widen(row[i]);
      squares += x * x;
    }
    const float scale = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(p.head_dim) + p.eps);
    for (uint32_t i = lane; i < p.head_dim; i += kWarp) {
      row[i] = narrow<T>(widen(row[i]) * scale * p.o_norm[i] * output_gate<kFault>(p, token, head * p.head_dim + i));
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
