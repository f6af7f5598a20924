// Parameters of row gathers. The Rust side mirrors this layout.
#pragma once
#include <stdint.h>

struct GatherParams {
  const void* table;       // [rows][width] T
  const uint32_t* indices; // [gridDim.x]; row number, counted from `first`
  void* out;               // [gridDim.x][width] T, or float32 where widened; zero where the index lies outside the table
  uint32_t first;
  uint32_t rows;
  uint32_t width;
  uint32_t reserved;
};
