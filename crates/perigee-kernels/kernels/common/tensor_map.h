// How the copy engine sees a matrix, as `cuTensorMapEncodeTiled` leaves it. The Rust side makes it.
#pragma once
#include <stdint.h>

struct alignas(64) TensorMap {
  uint64_t words[16];
};
