// Parameters of the KDA kernels. The Rust side mirrors this layout. T is the activation type; P = heads * head_dim.
#pragma once
#include <stdint.h>

// A row of the step as the kernels see it.
struct KdaRow {
  uint32_t first_token;  // index of its first token in the step
  uint32_t tokens;       // 0 for a row that pads the step
  uint32_t read_slot;
  uint32_t write_slot;
};

// A chunk of up to 64 tokens of one row.
struct KdaChunk {
  uint32_t row;         // index into the rows
  uint32_t first;       // offset of the chunk's first token within its row
  uint32_t tokens;
};

// Rows of the workspace with bfloat16 activations, in numbers.
constexpr int kRowPadding = 8;         // behind each row of queries, keys and Wd
constexpr int kAttentionPitch = 72;    // of Pqk
constexpr int kUpdateColumns = 32;     // of U, which lies by blocks of columns
constexpr int kUpdatePitch = 40;       // of such a block

struct KdaParams {
  const void* projected;  // [tokens][projected_pitch] T: q, k, v of P each before the convolution, f_a, g_a, then b of heads
  const float* gates;     // [tokens][2 P]: pre-activation of the decay without dt_bias, then of the output gate
  const float* conv;      // [taps][3 P], the last tap is the current token's
  const float* dt_bias;   // [P]
  const float* a_log;     // [heads]
  const float* o_norm;    // [head_dim]
  float* state;           // [slots][layers][heads][head_dim (key)][head_dim (value)]
  void* tails;            // [slots][layers][taps - 1][3 P] T, oldest first
  void* mixed;            // [tokens][P] T: out
  const void* gate_weights;  // [2 P][head_dim] T: second halves of the decay and of the output gate
  const KdaRow* rows;
  const KdaChunk* chunks;
  // Workspace of the chunked form: C = 64 rows for each (chunk, head), rows beyond the chunk's tokens are zero. With bfloat16 rows are
  // padded as the scan has them in shared memory, so that each array of a (chunk, head) is one piece for the copy engine.
  void* convolved;        // [tokens][3 P] T
  void* query;            // [chunks][heads][C][head_dim] T      Q . e^G
  void* key;              // [chunks][heads][C][head_dim] T      K . e^{G_C - G}
  void* erase;            // [chunks][heads][C][head_dim] T      Wd = (I + Lkk)^-1 (beta . K . e^G)
  float* update;          // [chunks][heads][C][head_dim]        U = (I + Lkk)^-1 (beta . V); bfloat16: [..][head_dim / 32][C][32]
  void* attention;        // [chunks][heads][C][C] T             Pqk
  float* decay;           // [chunks][heads][head_dim]           e^{G_C}
  const uint32_t* row_chunks;  // [rows + 1]: chunks of row i are row_chunks[i] .. row_chunks[i + 1]
  uint32_t projected_pitch;
  uint32_t heads;
  uint32_t head_dim;
  uint32_t taps;
  uint32_t layer;         // index of this layer among the KDA layers
  uint32_t layers;
  float eps;
  float query_scale;      // head_dim^-1/2
  uint32_t first_row;     // the chunked kernels take rows and chunks in groups that fit the workspace
  uint32_t first_chunk;
};
