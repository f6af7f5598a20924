// Parameters of the mixture-of-experts kernels. The Rust side mirrors this layout. T is the activation type, E experts,
// k experts of a token, f inner width (padded to a multiple of 8), d hidden. Shared experts that are as wide as routed ones are
// experts E, E + 1, ... which every token has behind its k, with weight 1; "k + s" counts them.
#pragma once
#include <stdint.h>

#include "common/tensor_map.h"
#include "norm/params.h"

// Rows of one expert that one block column of a grouped product computes.
struct MoeTile {
  uint32_t expert;
  uint32_t first;   // sorted row
  uint32_t rows;
};

struct MoeRouterParams {
  const void* x;            // [tokens][d] T
  const float* weight;      // [E][d]
  float* scores;            // [parts][tokens][E]: products before the sigmoid, each over a part of the depth
  uint32_t tokens;
  uint32_t experts;
  uint32_t hidden;
  uint32_t parts;
};

constexpr uint32_t kNoExpert = 0xffffffffu;

struct MoeSelectParams {
  const float* scores;      // [parts][tokens][E]
  const float* bias;        // [E]
  const uint32_t* forced;   // [tokens][k], or null
  uint32_t* own;            // [tokens][k], ascending: the layer's own selection
  const uint32_t* live;     // [1]: tokens behind these only pad the step
  uint32_t* chosen;         // [tokens][k + s]: what is computed; kNoExpert for tokens that pad the step
  float* weights;           // [tokens][k + s]
  uint32_t tokens;
  uint32_t experts;
  uint32_t top_k;
  uint32_t groups;
  uint32_t top_groups;
  uint32_t renormalize;
  float scale;
  uint32_t shared;          // s
  uint32_t parts;           // of scores, to be added
  uint32_t reserved;
};

struct MoeSortParams {
  const uint32_t* chosen;   // [entries]
  uint32_t* source;         // [entries]: entry (token * k + choice) of every sorted row
  uint32_t* position;       // [entries]: sorted row of every entry, kNoExpert where it has no expert
  MoeTile* tiles;
  uint32_t* tile_count;     // [1]
  unsigned long long* touched;  // [1]: routed experts with entries are added to it
  uint32_t entries;
  uint32_t experts;         // E + s
  uint32_t tile_rows;
  uint32_t routed;          // E
};

// Router, selection and sort of a few tokens; and ahead of them the norm of the residual stream that the router reads.
struct MoeRouteParams {
  MoeRouterParams router;
  MoeSelectParams select;
  MoeSortParams sort;       // without entries: nothing is sorted, there is one token
  NormParams norm;          // of which the router's x is `out`; for the kernels that norm
  uint32_t* arrived;        // [1 + groups of 4 tokens], 0 between launches: groups that are selected, and blocks whose scores are there
};

// The sort by several blocks, for steps of many tokens. As MoeSortParams, but for what is said.
struct MoeSpreadParams {
  const uint32_t* chosen;
  uint32_t* source;
  uint32_t* position;
  MoeTile* tiles;
  uint32_t* tile_count;     // [2]: tiles, then sorted rows
  unsigned long long* touched;
  uint32_t* counts;         // [blocks][experts]: workspace
  uint32_t entries;
  uint32_t experts;
  uint32_t tile_rows;       // at most, a multiple of 16
  uint32_t routed;
  uint32_t block_entries;   // entries of a block
  uint32_t reserved;
};

struct MoeProductParams {
  const void* in;           // gate and up: x [tokens][d] T; down: inner rows [entries][f] T
  const void* weight;       // gate and up: [E][2 f][d] T, blocks of 8 gate rows then 8 up rows; down: [E][d][f] T
  void* out;                // gate and up: [entries][f] T, silu(gate) . up; down: [entries][d] T
  const uint32_t* source;   // gate and up: sorted row to entry
  const MoeTile* tiles;
  const uint32_t* tile_count;
  uint32_t depth;           // summed length: d, or f
  uint32_t width;           // columns of `out`: f, or d
  uint32_t top_k;           // k + s
  uint32_t reserved;
};

// The products of one token's experts.
struct MoeSingleParams {
  const void* in;           // gate and up: x [d] T; down: inner rows [k + s][f] T
  const void* weight;       // as MoeProductParams
  void* out;                // gate and up: [k + s][f] T, by choice; down: [d] T, the weighted sum
  const uint32_t* chosen;   // [k + s]
  const float* weights;     // [k + s]
  uint32_t depth;
  uint32_t width;
  uint32_t choices;         // k + s
  uint32_t shared;          // s
  uint32_t experts;         // E
  uint32_t stages;          // of a warp's ring
};

// Grouped products for many rows an expert; a tile has at most 256 rows.
struct MoeWideParams {
  TensorMap weight;         // of `depth` columns: as in MoeProductParams; boxes of 64 columns by 128 rows, 128-byte swizzle
  TensorMap rows;           // [entries][depth] T, sorted; boxes of 64 columns by 32 rows
  void* out;                // as MoeProductParams
  const MoeTile* tiles;
  const uint32_t* tile_count;
  uint32_t depth;
  uint32_t width;
  uint32_t reserved[8];
};

// Rows of x in the order of the sort.
struct MoeGatherParams {
  const void* x;            // [tokens][hidden] T
  void* out;                // [entries][hidden] T
  const uint32_t* source;   // [entries, rounded up to 16]
  const uint32_t* rows;     // [1]
  uint32_t pieces;          // of 16 bytes a row
  uint32_t top_k;           // k + s
};

struct MoeCombineParams {
  const void* rows;         // [entries][d] T, sorted
  const void* shared;       // [tokens][d] T of shared experts that are an MLP of their own, or null
  const uint32_t* position; // [entries]
  const float* weights;     // [entries]
  void* out;                // [tokens][d] T
  uint32_t hidden;
  uint32_t top_k;           // k + s
};

// A sum of experts and the norm of the residual stream that reads it: `combine.out` is the norm's delta, and is not written.
struct MoeCombineNormParams {
  MoeCombineParams combine;
  NormParams norm;
};
