// Parameters of the draws. The Rust side mirrors this layout.
#pragma once
#include <stdint.h>

// One draw, as the host sends it.
struct SampleRow {
  double temperature;    // divides the logits; 1 for greedy draws
  double top_p;          // 1 keeps all
  double log_min_p;      // ln(min_p); -infinity keeps all
  uint64_t seed;
  uint64_t position;
  uint32_t choice;
  uint32_t top_k;        // 0 keeps all
  float repetition;
  float frequency;
  float presence;
  uint32_t first_change; // into changes
  uint32_t changes;
  uint32_t mask;         // first word in masks; kSampleNone without a mask
  uint32_t alternatives; // most likely tokens to report, plus 1; 0 where no logprob is wanted
  uint32_t flags;
};
constexpr uint32_t kSampleNone = 0xffffffffu;
constexpr uint32_t kSampleGreedy = 1;    // no noise
constexpr uint32_t kSampleFiltered = 2;  // top-k, top-p or min-p may remove tokens

// A token whose logit is changed before the draw and put back after it.
struct SampleChange {
  uint32_t token;
  uint32_t output;  // how often it was generated
  float bias;
  uint32_t flags;
  float raw;        // the model's logit; written here
};
constexpr uint32_t kChangePenalise = 1;
constexpr uint32_t kChangeBias = 2;
constexpr uint32_t kChangeBan = 4;

// What the filters keep: tokens whose (logit, lower id first) ranks no lower than (key, token), and whose scaled logit is not
// below bound.
struct SampleCut {
  double bound;
  double margin;
  uint32_t key;
  uint32_t token;
  uint32_t status;
  uint32_t reserved;
};

// The two best scores of a chunk of tokens; -infinity where there are fewer.
struct SamplePart {
  double best;
  double second;
  uint32_t token;
  uint32_t status;
};

constexpr int kSampleAlternatives = 20;
struct SampleResult {
  double normaliser;  // ln of the sum of exp of the model's logits
  uint32_t token;
  uint32_t status;
  float margin;
  float logprob;
  uint32_t found;     // alternatives, most likely first
  uint32_t reserved;
  uint32_t tokens[kSampleAlternatives];
  float logprobs[kSampleAlternatives];
};
// Statuses, or-ed. With any of them the host draws by itself from the row, which is as the model left it.
constexpr uint32_t kSampleBadLogit = 1;  // not a number, or +infinity
constexpr uint32_t kSampleNobody = 2;    // nothing can be drawn
constexpr uint32_t kSampleTies = 4;      // more equal logits at a cut than a list holds

struct SampleParams {
  float* logits;         // [rows][vocab]
  const SampleRow* rows;
  SampleChange* changes;
  const uint64_t* masks; // token t may be drawn if bit t % 64 of word t / 64 is set
  SampleCut* cuts;       // [rows]
  SamplePart* parts;     // [rows][parts_per_row]
  SampleResult* results; // [rows]
  uint32_t vocab;
  uint32_t parts_per_row;
};

struct FeedParams {
  const SampleResult* results;
  const uint32_t* from;  // [count], into results
  uint32_t* tokens;      // [count]
  uint32_t count;
  uint32_t reserved;
};
