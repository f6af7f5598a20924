// Parameters of the element-wise companions of dense products. The Rust side mirrors this layout.
#pragma once
#include <stdint.h>

#include "norm/params.h"

struct ElementParams {
  const void* in;     // convert: [count] float32; silu_mul: [rows][2 width] T, gate then up, or both in turn by blocks
  void* out;          // convert: [count] T; silu_mul: [rows][width] T
  uint64_t count;     // elements of `out`
  uint32_t width;
  uint32_t block;     // columns of a block of gate and of the block of up behind it; 0: all of gate, then all of up
};

struct SkinnyParams {
  const void* in;      // [tokens][in_pitch] bfloat16
  const void* weight;  // [rows][depth] bfloat16
  void* out;           // [tokens][out_pitch] bfloat16 or float32
  uint32_t tokens;
  uint32_t rows;       // at least those of a block, a multiple of 16
  uint32_t depth;      // a multiple of 64
  uint32_t in_pitch;   // a multiple of 8
  uint32_t out_pitch;
  uint32_t stages;     // of single.cuh; not used by the others
};

// A product of one token that is normed on the way: `product.in` is the norm's result.
struct NormedProductParams {
  SkinnyParams product;
  NormParams norm;       // `sum` is not `residual`: other blocks still read it
};
