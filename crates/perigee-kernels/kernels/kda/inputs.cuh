// Steps 1 to 4 and 6 of the KDA layer for single elements: convolution taps, gate, write strength, output norm. Shared by the
// recurrent and the chunked kernels, so that both round at the same places.
#pragma once
#include "common/common.cuh"
#include "common/faults.cuh"
#include "kda/params.h"

// Index of the first state element of a head in a slot.
__device__ __forceinline__ uint64_t state_offset(const KdaParams& p, uint32_t slot, uint32_t head) {
  return ((static_cast<uint64_t>(slot) * p.layers + p.layer) * p.heads + head) * p.head_dim * p.head_dim;
}

// Index of the oldest tail of channel 0 in a slot.
__device__ __forceinline__ uint64_t tail_offset(const KdaParams& p, uint32_t slot) {
  return (static_cast<uint64_t>(slot) * p.layers + p.layer) * (p.taps - 1) * 3 * p.heads * p.head_dim;
}

// Input of the convolution of `channel` (0 .. 3 P) at token `at` of a row; negative tokens are the tails of the slot read.
template <class T>
__device__ __forceinline__ float conv_input(const KdaParams& p, const KdaRow& row, int at, uint32_t channel) {
  if (at >= 0) {
    return widen(static_cast<const T*>(p.projected)[static_cast<uint64_t>(row.first_token + at) * p.projected_pitch + channel]);
  }
  const uint32_t channels = 3 * p.heads * p.head_dim;
  const uint32_t tail = static_cast<uint32_t>(at + static_cast<int>(p.taps) - 1);
  return widen(static_cast<const T*>(p.tails)[tail_offset(p, row.read_slot) + static_cast<uint64_t>(tail) * channels + channel]);
}

// Convolution and silu of `channel` at token `at` of a row, rounded to T.
template <class T>
__device__ __forceinline__ float convolved(const KdaParams& p, const KdaRow& row, int at, uint32_t channel) {
  const uint32_t channels = 3 * p.heads * p.head_dim;
  float sum = 0.0f;
  for (uint32_t tap = 0; tap < p.taps; tap++) {
    sum += p.conv[tap * channels + channel] * conv_input<T>(p, row, at - static_cast<int>(p.taps - 1 - tap), channel);
  }
  return rounded<T>(silu(sum));
}

// Log decay of a pre-activation z, dt_bias added.
__device__ __forceinline__ float log_decay_of(float z, float a_log) { return -expf(a_log) * softplus(z); }

// Log decay of a key channel (0 .. P) for a token of the step.
__device__ __forceinline__ float log_decay(const KdaParams& p, uint32_t token, uint32_t channel) {
  const uint64_t pitch = 2ull * p.heads * p.head_dim;
  const float z = p.gates[token * pitch + channel] + p.dt_bias[channel];
  return log_decay_of(z, p.a_log[channel / p.head_dim]);
}

// Write strength of a head for a token of the step.
template <class T>
__device__ __forceinline__ float write_strength(const KdaParams& p, uint32_t token, uint32_t head) {
  const uint32_t column = 3 * p.heads * p.head_dim + 2 * p.head_dim + head;
  return rounded<T>(sigmoid(widen(static_cast<const T*>(p.projected)[static_cast<uint64_t>(token) * p.projected_pitch + column])));
}

// Output gate of a pre-activation z, for a result in T.
template <class T = float, Fault kFault = Fault::kNone>
__device__ __forceinline__ float output_gate_of(float z) {
  return kFault == Fault::kSiluGate ? silu(z) : sigmoid_for<T>(z);
}

// Output gate of a value channel (0 .. P) for a token of the step.
template <Fault kFault = Fault::kNone>
__device__ __forceinline__ float output_gate(const KdaParams& p, uint32_t token, uint32_t channel) {
  const uint64_t width = static_cast<uint64_t>(p.heads) * p.head_dim;
  return output_gate_of<float, kFault>(p.gates[token * 2 * width + width + channel]);
}
