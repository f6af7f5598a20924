// Parameters of the KDA kernels. The Rust side mirrors this layout. T is the activation type; P = heads * head_dim.
#pragma once
#include <stdint.h>

// A row of the step as the kernels see it.
struct KdaRow {
  uint32_t first_token;  // index of its first token in the step
  uint32_t tokens;
  uint32_t read_slot;
  uint32_t write_slot;
};

// A chunk of up to 64 tokens of one row.
struct KdaChunk {
  uint32_t row;         // index into the rows
  uint32_t first;       // offset of the chunk's first token within its row
  uint32_t tokens;
};

struct KdaParams {
  const void* projected;  // [tokens][projected_pitch] T: q, k, v of P each before the convolution, f_a, g_a, then b of heads
  const void* gates;      // [tokens][2 P] T: pre-activation of the decay without dt_bias, then of the output gate
  const float* conv;      // [taps][3 P], the last tap is the current token's
  const float* dt_bias;   // [P]
  const float* a_log;     // [heads]
  const float* o_norm;    // [head_dim]
  float* state;           // [slots][layers][heads][head_dim (key)][head_dim (value)]
  void* tails;            // [slots][layers][taps - 1][3 P] T, oldest first
  void* mixed;            // [tokens][P] T: out
  const KdaRow* rows;
  const KdaChunk* chunks;
  // Workspace of the chunked form; one entry for each (chunk, head), padded to 64 tokens.
  void* convolved;        // [tokens][3 P] T
  float* query;           // [chunks][heads][64][head_dim]  Q . e^G
  float* key;             // [chunks][heads][64][head_dim]  K . e^{G_C - G}
  float* erase;           // [chunks][heads][64][head_dim]  Wd = T (beta . K . e^G)
  float* update;          // [chunks][heads][64][head_dim]  U = T (beta . V)
  float* attention;       // [chunks][heads][64][64]        Pqk
  float* decay;           // [chunks][heads][head_dim]      e^{G_C}
  const uint32_t* row_chunks;  // [rows + 1]: chunks of row i are row_chunks[i] .. row_chunks[i + 1]
  uint32_t projected_pitch;
  uint32_t heads;
  uint32_t head_dim;
  uint32_t taps;
  uint32_t layer;         // index of this layer among the KDA layers
  uint32_t layers;
  float eps;
  float query_scale;      // head_dim^-1/2
};
