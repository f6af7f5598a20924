// The whole KDA mixer between its dense products for rows of one token: convolution, silu, norms, gate, state update, output
// norm and output gate in one kernel. One block of 256 threads a (row, head); the state passes through registers once. For few
// rows, where the kernel is bound by latency; see kda_decode_bulk.cu for many, and README.md.
#include "kda/decode.cuh"

template <class T, int kDim, Fault kFault = Fault::kNone>
__device__ __forceinline__ void decode(const KdaParams& p) {
  using Share = StateShare<kDim>;
  __shared__ DecodeShared<kDim> s;
  grid_trigger();
  // Rows come with the step's plan, and state and tails are this kernel's alone: none of them waits for the kernel ahead.
  const uint32_t head = blockIdx.x;
  const KdaRow row = p.rows[blockIdx.y];
  // A row that only pads the step to a recorded size has no slots.
  if (row.tokens == 0) {
    grid_wait();
    return;
  }
  // The state is asked for first; everything up to its use hides the wait.
  const uint32_t place = Share::first_row() * kDim + Share::column();
  const float* source = p.state + state_offset(p, row.read_slot, head) + place;
  float4 state[Share::kRows];
#pragma unroll
  for (int r = 0; r < Share::kRows; r++) state[r] = *reinterpret_cast<const float4*>(source + r * Share::kStep * kDim);

  const Factors factors = prepare<T, kDim, kFault>(p, row, head, s);
  float4 read = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int r = 0; r < Share::kRows; r++) {
    const uint32_t c = Share::first_row() + r * Share::kStep;
    const float d = s.decay[c], k = s.key[c] * factors.key;
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
  gather(read, s);
  const float4 delta = correction(factors.strength, s);
  float* target = p.state + state_offset(p, row.write_slot, head) + place;
  float4 out = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int r = 0; r < Share::kRows; r++) {
    const uint32_t c = Share::first_row() + r * Share::kStep;
    const float k = s.key[c] * factors.key, q = s.query[c] * factors.query;
    state[r].x += k * delta.x;
    state[r].y += k * delta.y;
    state[r].z += k * delta.z;
    state[r].w += k * delta.w;
    float4 kept = state[r];
    if (kFault == Fault::kRoundedState) kept = {rounded<bf16>(kept.x), rounded<bf16>(kept.y), rounded<bf16>(kept.z), rounded<bf16>(kept.w)};
    *reinterpret_cast<float4*>(target + r * Share::kStep * kDim) = kept;
    out.x += q * state[r].x;
    out.y += q * state[r].y;
    out.z += q * state[r].z;
    out.w += q * state[r].w;
  }
  gather(out, s);
  finish<T>(p, row, head, s);
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
    decode<float, dim, fault>(p);                                                                                           \
  }
#define KDA_DECODE_FAULTS(dim)                                         \
  KDA_DECODE_FAULT(decay_after_read, Fault::kDecayAfterRead, dim)      \
  KDA_DECODE_FAULT(rounded_state, Fault::kRoundedState, dim)           \
  KDA_DECODE_FAULT(silu_gate, Fault::kSiluGate, dim)
KDA_DECODE_FAULTS(32)
KDA_DECODE_FAULTS(64)
KDA_DECODE_FAULTS(128)
#endif
