// Parameters of the MLA kernels. The Rust side mirrors this layout. T is the activation type; R latent, r rope, n nope.
#pragma once
#include <stdint.h>

#include "common/tensor_map.h"

constexpr uint32_t kPageTokens = 64;
constexpr uint32_t kNoPart = 0xffffffffu;
constexpr uint32_t kNoPlace = 0xffffffffu;

// Query tokens of one row, against a list of key ranges.
struct AttendItem {
  uint32_t first_token;     // index in the step
  uint32_t tokens;          // 0 for an item that only pads the plan
  uint32_t first_position;  // absolute position of the first token
  uint32_t first_range;     // into the ranges
  uint32_t ranges;
  uint32_t part;            // slot of the partial result, or kNoPart: straight to the output
};

// Keys of absolute positions start .. end.
struct AttendRange {
  uint32_t pages;      // index into the page table of the page that holds `first_page`
  uint32_t first_page; // absolute page number, position / 64, of that entry
  uint32_t start;
  uint32_t end;
};

// Parts to be merged for some tokens.
struct AttendMerge {
  uint32_t first_token;
  uint32_t tokens;          // 0 for one that only pads the plan
  uint32_t first_part;
  uint32_t parts;
};

struct MlaStoreParams {
  const void* projected;        // [tokens][pitch] T: queries of heads (n + r), then at kv_offset the latent R and the key r
  const float* norm;            // [R]
  void* latents;                // [pages][64][R + r] T of this layer
  float* queries;               // [tokens][heads][R + r]; only the last r of a head are written here
  const uint32_t* places;       // [tokens]: page * 64 + offset of the token's latent, kNoPlace for a token that pads the step
  uint32_t pitch;
  uint32_t kv_offset;
  uint32_t heads;
  uint32_t nope;
  uint32_t rope;
  uint32_t latent;
  float eps;
  uint32_t query_pitch;         // of the queries' source, which may be another matrix
  const void* query_source;     // [tokens][query_pitch] T
};

// Keys absorbed into the queries of few tokens, with the latent store.
struct MlaAbsorbParams {
  MlaStoreParams store;
  const void* weight;           // [heads][n + m][R] T: n key rows, then m value rows
  uint32_t value;               // m
  uint32_t reserved;
};

// Values of few tokens out of their latent averages.
struct MlaValuesParams {
  const float* latents;         // [tokens][heads][R]
  const void* weight;           // as MlaAbsorbParams
  void* out;                    // [tokens][heads][m] T
  uint32_t heads;
  uint32_t nope;
  uint32_t value;
  uint32_t latent;
};

struct MlaAttendParams {
  const float* queries;         // [tokens][heads][R + r], unscaled
  const void* latents;          // [pages][64][R + r] T of this layer
  float* output;                // [tokens][heads][R]
  float* lse;                   // [tokens][heads]
  float* part_output;           // [parts][part_rows][R]
  float* part_lse;              // [parts][part_rows]; row = token within the item * heads + head
  const AttendItem* items;
  const AttendRange* ranges;
  const uint32_t* pages;
  const AttendMerge* merges;
  uint32_t heads;
  uint32_t latent;
  uint32_t rope;
  uint32_t part_rows;
  float scale;
  uint32_t reserved;
};

// Decode items on Hopper's matrix instructions: block b works through the items from first_items[b] to first_items[b + 1].
struct MlaDecodeParams {
  TensorMap latents;            // [pages * 64][R + r] of this layer; boxes of 64 columns by 64 rows with 128-byte swizzle
  MlaAttendParams attend;
  const uint32_t* first_items;  // [blocks + 1]
  uint32_t reserved[4];
};

// Another part of the same queries, for one token.
struct MlaMergeParams {
  float* output;                // [heads][R], of the token
  float* lse;                   // [heads]
  const float* other_output;    // [heads][R]
  const float* other_lse;       // [heads]
  uint32_t latent;
  uint32_t reserved;
};

// The expanded form works through the context by stretches whose latents lie together in working memory.

// Keys of one page: `keys` rows from `place` (page * 64 + offset) to row `row` of the stretch.
struct GatherRun {
  uint32_t place;
  uint32_t row;
  uint32_t keys;
};

struct MlaGatherParams {
  const void* latents;          // [pages][64][R + r] of this layer
  void* out;                    // [rows][R + r]
  const GatherRun* runs;
  uint32_t pieces;              // of 16 bytes a row
  uint32_t reserved;
};

constexpr uint32_t kFirstStretch = 1;  // no result of keys before
constexpr uint32_t kLastStretch = 2;   // none of its tokens sees a key behind this stretch

// Up to 128 query tokens of one row against the keys of one stretch.
struct ExpandedItem {
  uint32_t first_token;     // index in the step
  uint32_t tokens;
  uint32_t first_position;  // absolute position of the first token
  uint32_t first_key;       // absolute position of the key in `first_row`
  uint32_t first_row;       // of the stretch
  uint32_t keys;            // at least 1
  uint32_t flags;
};

struct MlaExpandedParams {
  TensorMap queries;      // [tokens][heads * 192] T; all boxes are 64 columns by 128 rows with 128-byte swizzle
  TensorMap expanded;     // [rows][heads * 256] T: a head's 128 of the key, then its value
  TensorMap latents;      // [rows][576] T
  float* output;            // [tokens][heads * 512]: the result so far, heads * 128, at the start of a token's
  float* lse;               // [tokens][heads]
  void* values;             // [tokens][value_pitch] T: the result, heads * 128
  const ExpandedItem* items;
  uint32_t heads;
  uint32_t value_pitch;
  float scale;
  uint32_t reserved[5];
};
