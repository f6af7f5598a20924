//! Model ops as a trait in the words of the model, and the conformance suite that every backend passes.
