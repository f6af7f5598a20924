// Parameters of the RMS norms. The Rust side mirrors this layout.
#pragma once
#include <stdint.h>

struct NormParams {
  const void* residual; // [rows][residual_pitch], float32 for kernels of the stream, else T
  const void* delta;    // [rows][width] T, or null
  const float* weight;  // [width]
  void* out;            // [rows][out_pitch] T
  void* sum;            // [rows][residual_pitch]: residual + delta, where there is a delta; may be `residual`
  uint32_t width;
  uint32_t residual_pitch;
  uint32_t out_pitch;
  float eps;
};
