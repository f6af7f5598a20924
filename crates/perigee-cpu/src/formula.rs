//! Which formulas the ops compute: the model's. With the cargo feature `planted-faults`, which tests use and no shipped
//! binary has, one of them can be replaced by a typical mistake, to show that the golden check notices it. Without the
//! feature the questions asked here have constant answers, and the compiler drops the branches.

#[cfg(feature = "planted-faults")]
mod mistakes;

use perigee_backend::Row;

use crate::ops::kda_chunk::HeadInputs;

/// A typical mistake in a formula.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// KDA's output norm with epsilon 1e-6 for 1e-5.
    OutputNormEpsilon,
    /// KDA's decay applied after the delta rule has read the state.
    DecayAfterRead,
    /// Expert weights from the scores with the correction bias.
    BiasedWeights,
    /// Experts selected without the correction bias.
    UnbiasedSelection,
    /// KDA queries without their scale, D^-1/2.
    NoQueryScale,
    /// Softmax scale n^-1/2 for (n + r)^-1/2.
    ScaleWithoutRope,
    /// MLA's shared key and its part of the queries rotated by their positions.
    Rotary,
    /// The short convolutions' taps in reverse order.
    ReversedTaps,
    /// silu for the sigmoid of KDA's output gate.
    SiluGate,
    /// The recurrent state rounded to bfloat16 after every token.
    RoundedState,
}

/// The formulas of a backend.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Formula {
    #[cfg(feature = "planted-faults")]
    fault: Option<Fault>,
}

/// The gated delta rule over one head of one row: inputs, D, state `[D, D]`, outputs `[tokens, D]`.
pub(crate) type Recurrence = fn(&HeadInputs, usize, &mut [f32], &mut [f32]);

#[cfg(feature = "planted-faults")]
impl Formula {
    /// Formulas with one mistake.
    pub(crate) fn with(fault: Fault) -> Self {
        Self { fault: Some(fault) }
    }

    /// Whether this mistake is planted.
    pub(crate) fn has(self, fault: Fault) -> bool {
        self.fault == Some(fault)
    }

    /// A delta rule to use instead of the right one.
    pub(crate) fn recurrence(self) -> Option<Recurrence> {
        match self.fault {
            Some(Fault::DecayAfterRead) => Some(mistakes::decay_after_read),
            Some(Fault::RoundedState) => Some(mistakes::rounded_state),
            _ => None,
        }
    }

    /// Rotates the last `rope` of every `width` channels of the rows' tokens, if that mistake is planted.
    pub(crate) fn rotate(self, rows: &[Row], (width, rope): (usize, usize), values: &mut [f32]) {
        if self.has(Fault::Rotary) {
            mistakes::rotate(rows, (width, rope), values);
        }
    }
}

#[cfg(not(feature = "planted-faults"))]
impl Formula {
    pub(crate) fn has(self, _: Fault) -> bool {
        false
    }

    pub(crate) fn recurrence(self) -> Option<Recurrence> {
        None
    }

    pub(crate) fn rotate(self, _: &[Row], _: (usize, usize), _: &mut [f32]) {}
}
