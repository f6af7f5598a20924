// Typical mistakes in the formulas, one of which a kernel can be made with, to show that the golden check notices it. Such
// kernels exist only where the build defines PERIGEE_PLANTED_FAULTS (cargo feature `planted-faults`): no shipped image has one.
#pragma once

enum class Fault {
  kNone,
  kDecayAfterRead,  // KDA's decay applied after the delta rule has read the state
  kRoundedState,    // the recurrent state rounded to bfloat16 after every token
  kSiluGate,        // silu for the sigmoid of KDA's output gate
  kBiasedWeights,   // expert weights from the scores with the correction bias
  kRotary,          // MLA's shared key and its part of the queries rotated by their positions
};
