// The KDA recurrence token by token, for any head size up to 1024 and any number of taps: the fallback for shapes that the
// fast kernels do not have. One block a (row, head); thread j owns value channel j, and with it column j of the state, which
// stays in memory (the second-level cache, for short rows).
#include "kda/inputs.cuh"

constexpr int kMaxDim = 1024;

template <class T, Fault kFault = Fault::kNone>
__device__ __forceinline__ void recurrent(const KdaParams& p) {
  __shared__ float query[kMaxDim];
  __shared__ float key[kMaxDim];
  __shared__ float decay[kMaxDim];
  __shared__ float scratch[kWarp];
  const KdaRow row = p.rows[blockIdx.x];
  const uint32_t head = blockIdx.y;
  const uint32_t dim = p.head_dim;
  const uint32_t width = p.heads * dim;
  const uint32_t j = threadIdx.x;
  const bool active = j < dim;
  const uint32_t channel = head * dim + j;
  const float* source = p.state + state_offset(p, row.read_slot, head);
  float* state = p.state + state_offset(p, row.write_slot, head);

  for (uint32_t at = 0; at < row.tokens; at++) {
    const uint32_t token = row.first_token + at;
    float q = 0.0f, k = 0.0f, v = 0.0f;
    if (active) {
      q = convolved<T>(p, row, at, channel);
      k = convolved<T>(p, row, at, width + channel);
      v = convolved<T>(p, row, at, 2 * width + channel);
    }
    const float q_squares = block_sum(q * q, scratch);
    const float k_squares = block_sum(k * k, scratch);
    if (active) {
      query[j] = q / sqrtf(q_squares + 1e-6f) * p.query_scale;
      key[j] = k / sqrtf(k_squares + 1e-6f);
      decay[j] = expf(log_decay(p, token, channel));
    }
    __syncthreads();
    float output = 0.0f;
    if (active) {
      float read = 0.0f;
      for (uint32_t c = 0; c < dim; c++) {
        read += key[c] * (source[c * dim + j] * (kFault == Fault::kDecayAfterRead ? 1.0f : decay[c]));
      }
      const float delta = write_strength<T>(p, token, head) * (v - read);
      for (uint32_t c = 0; c < dim; c++) {
        const float s = source[c * dim + j] * decay[c] + key[c] * delta;
        state[c * dim + j] = kFault == Fault::kRoundedState ? rounded<bf16>(s) : s;
        output += query[c] * s;
      }
      output = rounded<T>(output);
    }
    source = state;
    const float mean = block_sum(output * output, scratch) / static_cast<float>(dim);
    if (active) {
      const float normed = output / sqrtf(mean + p.eps) * p.o_norm[j];
      const float gate = output_gate<kFault>(p, token, channel);
      static_cast<T*>(p.mixed)[static_cast<uint64_t>(token) * width + channel] = narrow<T>(normed * gate);
    }
  }

  // Each thread moves the tails of its own three channels; ascending order reads an entry before it is overwritten.
  if (active) {
    T* tails = static_cast<T*>(p.tails) + tail_offset(p, row.write_slot);
    for (uint32_t which = 0; which < 3; which++) {
      for (uint32_t tail = 0; tail + 1 < p.taps; tail++) {
        const int at = static_cast<int>(row.tokens + tail) - static_cast<int>(p.taps - 1);
        const float value = conv_input<T>(p, row, at, which * width + channel);
        tails[static_cast<uint64_t>(tail) * 3 * width + which * width + channel] = narrow<T>(value);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(1024) kda_recurrent_fp32(const __grid_constant__ KdaParams p) { recurrent<float>(p); }
extern "C" __global__ void __launch_bounds__(1024) kda_recurrent_bf16(const __grid_constant__ KdaParams p) { recurrent<bf16>(p); }

#ifdef PERIGEE_PLANTED_FAULTS
extern "C" __global__ void __launch_bounds__(1024) kda_recurrent_fp32_decay_after_read(const __grid_constant__ KdaParams p) { recurrent<float, Fault::kDecayAfterRead>(p); }
extern "C" __global__ void __launch_bounds__(1024) kda_recurrent_fp32_rounded_state(const __grid_constant__ KdaParams p) { recurrent<float, Fault::kRoundedState>(p); }
extern "C" __global__ void __launch_bounds__(1024) kda_recurrent_fp32_silu_gate(const __grid_constant__ KdaParams p) { recurrent<float, Fault::kSiluGate>(p); }
#endif
