// Parameters of the RMS norms. The Rust side mirrors this layout.
#pragma once
#include <stdint.h>

struct NormParams {
  void* residual;       // [rows][residual_pitch], float32 for kernels of the stream, else T; with a delta it is updated in place, else only read
  const void* delta;    // [rows][width] T, or null
  const float* weight;  // [width]
  void* out;            // [rows][out_pitch] T
  uint32_t width;
  uint32_t residual_pitch;
  uint32_t out_pitch;
  float eps;
};
