//! Token sampling as a pure function of logits, parameters, seed, choice and position.
