//! Which formulas the ops compute: the model's. With the cargo feature `planted-faults`, which no shipped binary has, the
//! environment can name a typical mistake to compute instead, to show that the golden check notices it. Without the feature
//! the questions asked here have constant answers, and the compiler drops the branches.

use perigee_backend::Result;

/// A typical mistake in a formula, as on the CPU. The kernels with a mistake are float32 only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
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

#[cfg(feature = "planted-faults")]
impl Formula {
    /// The formulas that PERIGEE_PLANTED_FAULT asks for: the right ones where it is unset.
    pub(crate) fn from_environment() -> Result<Self> {
        const VARIABLE: &str = "PERIGEE_PLANTED_FAULT";
        let Ok(name) = std::env::var(VARIABLE) else { return Ok(Self::default()) };
        let fault = match name.as_str() {
            "output_norm_epsilon" => Fault::OutputNormEpsilon,
            "decay_after_read" => Fault::DecayAfterRead,
            "biased_weights" => Fault::BiasedWeights,
            "unbiased_selection" => Fault::UnbiasedSelection,
            "no_query_scale" => Fault::NoQueryScale,
            "scale_without_rope" => Fault::ScaleWithoutRope,
            "rotary" => Fault::Rotary,
            "reversed_taps" => Fault::ReversedTaps,
            "silu_gate" => Fault::SiluGate,
            "rounded_state" => Fault::RoundedState,
            _ => return Err(perigee_backend::BackendError::Unsupported(format!("{VARIABLE}={name}: no such fault"))),
        };
        Ok(Self { fault: Some(fault) })
    }

    /// Whether this mistake is planted.
    pub(crate) fn has(self, fault: Fault) -> bool {
        self.fault == Some(fault)
    }

    /// What the name of a kernel ends in where one of these mistakes is planted, and nothing otherwise.
    pub(crate) fn suffix(self, faults: &[Fault]) -> &'static str {
        match self.fault.filter(|fault| faults.contains(fault)) {
            Some(Fault::DecayAfterRead) => "_decay_after_read",
            Some(Fault::RoundedState) => "_rounded_state",
            Some(Fault::SiluGate) => "_silu_gate",
            Some(Fault::BiasedWeights) => "_biased_weights",
            Some(Fault::Rotary) => "_rotary",
            _ => "",
        }
    }
}

#[cfg(not(feature = "planted-faults"))]
impl Formula {
    pub(crate) fn from_environment() -> Result<Self> {
        Ok(Self::default())
    }

    pub(crate) fn has(self, _: Fault) -> bool {
        false
    }

    pub(crate) fn suffix(self, _: &[Fault]) -> &'static str {
        ""
    }
}
