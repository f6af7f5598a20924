// Parameters of the weight loader. The Rust side mirrors this layout.
#pragma once
#include <stdint.h>

enum LoadSource : uint32_t { kConstant = 0, kUniform = 1, kNormal = 2, kBytesBf16 = 3, kBytesFp32 = 4 };

struct LoadParams {
  const void* source;   // [rows][columns] stored elements, for the two byte sources
  void* destination;    // element (i, j) goes to row placed(i), column j of a matrix of `pitch` columns
  uint64_t rows;
  uint64_t columns;
  uint64_t pitch;
  // placed(i) = row_offset + (i / group) * group_pitch + i % group
  uint64_t row_offset;
  uint64_t group;
  uint64_t group_pitch;
  // Random rule: element (i, j) has index first + i * row_stride + j.
  uint64_t key;
  uint64_t first;
  uint64_t row_stride;
  float a;              // constant; low end; factor of the centred sum
  float b;              // high minus low
  uint32_t kind;        // LoadSource
  uint32_t stored_bf16; // 1: the tensor is stored in bfloat16, so values are rounded to it first
};
