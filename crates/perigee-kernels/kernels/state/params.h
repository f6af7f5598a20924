// Parameters of the sums over a state slot. The Rust side mirrors this layout.
#pragma once
#include <stdint.h>

struct StateSumParams {
  const uint32_t* state;      // the slot's recurrent states as words: [layers][heads * head_dim * head_dim]
  const void* tails;          // the slot's convolution tails: [layers][tail][3][heads * head_dim], oldest first
  unsigned long long* sums;   // [layers][4]: state, tails of q, k and v; zero before
  uint32_t heads;             // of this rank
  uint32_t head_dim;
  uint32_t tail;              // inputs that a convolution keeps, W - 1
  uint32_t first_head;        // number of this rank's first head in the whole model
};
