//! Typical mistakes, planted in the engine's formulas one at a time: the golden check of `tiny` must fail on each, from the
//! layer on where the mistake is made. The same run without a fault passes.

use std::collections::BTreeSet;

use perigee_backend::DType;
use perigee_cpu::Fault;
use perigee_testkit::{GoldenCase, Report, ScoreRun, compare};

/// The first layers of their kind in `tiny`, 0-based: KDA, MLA, mixture of experts.
const KDA: usize = 0;
const MLA: usize = 3;
const EXPERTS: usize = 1;

fn judged(fault: Option<Fault>, chunk: Option<usize>) -> Report {
    let case = GoldenCase::committed("tiny").unwrap();
    let run = ScoreRun { chunk, fault, ..ScoreRun::golden(&case) };
    compare(&case.expected, &run.run().unwrap(), DType::Fp32)
}

/// The check fails on every kind of float tensor, and the residual stream is right until the layer with the mistake.
fn fails_from(layer: usize, fault: Fault, chunk: Option<usize>) {
    let report = judged(Some(fault), chunk);
    println!("{fault:?}\n{report}");
    assert!(!report.passed(), "nothing was noticed:\n{report}");
    let kinds = report.failed_kinds();
    let wanted = BTreeSet::from(["greedy_logits", "hidden", "kda_state", "logits"]);
    assert!(kinds.is_superset(&wanted), "noticed only in {kinds:?}:\n{report}");
    let failed = report.failed();
    for before in 0..layer {
        assert!(
            !failed.contains(format!("hidden_2_{before}").as_str()),
            "layer {before} is before the fault:\n{report}"
        );
    }
    assert!(failed.contains(format!("hidden_2_{layer}").as_str()), "layer {layer} has the fault:\n{report}");
}

#[test]
fn no_fault_passes() {
    for chunk in [None, Some(1)] {
        let report = judged(None, chunk);
        assert!(report.passed(), "{report}");
    }
}

macro_rules! faults {
    ($($test:ident: $fault:ident from $layer:ident;)*) => {
        $(#[test]
        fn $test() {
            fails_from($layer, Fault::$fault, None);
        })*
    };
}

faults! {
    output_norm_epsilon_fails: OutputNormEpsilon from KDA;
    decay_after_read_fails: DecayAfterRead from KDA;
    biased_expert_weights_fail: BiasedWeights from EXPERTS;
    unbiased_selection_fails: UnbiasedSelection from EXPERTS;
    no_query_scale_fails: NoQueryScale from KDA;
    softmax_scale_without_rope_fails: ScaleWithoutRope from MLA;
    rotary_fails: Rotary from MLA;
    reversed_taps_fail: ReversedTaps from KDA;
    silu_gate_fails: SiluGate from KDA;
    rounded_state_fails: RoundedState from KDA;
}

/// The recurrent form alone, token by token.
#[test]
fn rounded_state_fails_at_chunk_1() {
    fails_from(KDA, Fault::RoundedState, Some(1));
}

#[test]
fn decay_after_read_fails_at_chunk_1() {
    fails_from(KDA, Fault::DecayAfterRead, Some(1));
}
