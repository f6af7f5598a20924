// Parameters of the element-wise companions of dense products. The Rust side mirrors this layout.
#pragma once
#include <stdint.h>

struct ElementParams {
  const void* in;     // convert: [count] float32; silu_mul: [rows][2 width] T, gate then up, or both in turn by blocks
  void* out;          // convert: [count] T; silu_mul: [rows][width] T
  uint64_t count;     // elements of `out`
  uint32_t width;
  uint32_t block;     // columns of a block of gate and of the block of up behind it; 0: all of gate, then all of up
};
