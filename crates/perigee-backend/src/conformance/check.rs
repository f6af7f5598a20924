//! Comparisons and their limits: how far a result may be from the float64 reference in each activation type, and why. A
//! result that is not a number fails whatever the limit.

use crate::error::BackendError;
use crate::weights::DType;

use super::report::{CaseReport, Measure, Outcome};

/// What is compared; each has a limit of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Quantity {
    /// An RMS norm.
    Norm,
    /// The residual stream after a sum, which is full precision.
    Stream,
    /// A product with a weight matrix, and a gated MLP.
    Product,
    /// Logits.
    Logits,
    /// Output of the KDA mixer.
    KdaOutput,
    /// Recurrent KDA state.
    KdaState,
    /// Convolution tails.
    ConvTail,
    /// Latents as cached.
    Latent,
    /// Absorbed queries.
    Query,
    /// Attention in latent space.
    Attention,
    /// Log-sum-exp of scores: absolute, divided by the value's size where that exceeds 1.
    LogSumExp,
    /// Merging of partials that were given exactly.
    Merge,
    /// Output of the MLA mixer.
    MlaOutput,
    /// Output of a mixture of experts.
    Experts,
}

/// Most relative L2 error of a whole tensor, and of its worst row (a token, a head of a state).
#[derive(Debug, Clone, Copy)]
pub(super) struct Limit {
    whole: f64,
    row: f64,
}

/// The one table of tolerances.
///
/// float32: an inner product of length n <= 512 in float32 errs by about 6e-8 sqrt(n) of its terms' norm, so 1e-6; a mixer
/// chains some five of them, and a KDA state sums up to 200 tokens of them: measured 1e-6 to 3e-6, limit 1e-5. Rows that
/// cancel err more: five times the limit of the whole. Logits and merges are a single sum.
///
/// bfloat16: one rounding is off by at most 2^-9 = 0.002, by 0.0011 in the mean over a tensor. A norm rounds once or twice, and a
/// cached latent or a convolution input once or twice: measured 0.0025. A product of rounded factors is rounded again:
/// 0.005. A mixer rounds inputs, projections, gates and outputs, and some of these roundings pass through the softmax or the
/// decay: measured up to 0.013 by the CPU backend; the limits leave a device that also rounds attention weights or chunk
/// matrices a factor of two, and are still well below what formula faults make. A KDA token whose q and k are nearly
/// orthogonal, under a decay that leaves nothing else, is all cancellation, which the output norm then scales up: its row
/// may err tenfold. What stays in float32 (logits of given activations, merges, the residual stream) keeps a float32 limit.
pub(super) fn limit(quantity: Quantity, dtype: DType) -> Limit {
    let (whole, row) = match (dtype, quantity) {
        (_, Quantity::Merge | Quantity::Stream) => (2e-6, 1e-5),
        (DType::Fp32, Quantity::Norm | Quantity::Logits) => (2e-6, 1e-5),
        (DType::Fp32, Quantity::LogSumExp) => (1e-5, 1e-5),
        (DType::Fp32, _) => (1e-5, 5e-5),
        (DType::Bf16, Quantity::Norm | Quantity::Latent | Quantity::ConvTail) => (5e-3, 1e-2),
        (DType::Bf16, Quantity::Logits) => (1e-5, 5e-5),
        (DType::Bf16, Quantity::Product | Quantity::Query | Quantity::Experts) => (1e-2, 2e-2),
        (DType::Bf16, Quantity::Attention | Quantity::LogSumExp) => (2.5e-2, 5e-2),
        (DType::Bf16, Quantity::MlaOutput) => (2.5e-2, 8e-2),
        (DType::Bf16, Quantity::KdaOutput) => (2.5e-2, 2e-1),
        (DType::Bf16, Quantity::KdaState) => (2e-2, 4e-2),
    };
    Limit { whole, row }
}

/// Collects what one case finds.
pub(super) struct Checks {
    dtype: DType,
    /// Factor on the limits of this case.
    slack: f64,
    is_brief: bool,
    count: usize,
    worst: Option<Measure>,
    failures: Vec<String>,
}

impl Checks {
    pub(super) fn new(dtype: DType) -> Self {
        Self { dtype, slack: 1.0, is_brief: false, count: 0, worst: None, failures: Vec::new() }
    }

    /// Cases run with the least that launches what they launch.
    pub(super) fn brief(self) -> Self {
        Self { is_brief: true, ..self }
    }

    /// The sizes to run a case with: all, or the few that launch what all do.
    pub(super) fn sizes<'a, T>(&self, all: &'a [T], few: &'a [T]) -> &'a [T] {
        if self.is_brief { few } else { all }
    }

    /// Multiplies all limits from here on, for a case whose inputs amplify rounding by about this much.
    pub(super) fn relax(&mut self, factor: f64) {
        self.slack = factor;
    }

    /// `found` is `expected`, rows of `width`, within the limits of `quantity`.
    pub(super) fn close(&mut self, what: &str, quantity: Quantity, width: usize, found: &[f32], expected: &[f64]) {
        if found.len() != expected.len() {
            return self.holds(what, false, || format!("has {} elements, not {}", found.len(), expected.len()));
        }
        if let Some(place) = found.iter().position(|value| !value.is_finite()) {
            let (row, column) = (place / width, place % width);
            return self.holds(what, false, || format!("is {} at row {row}, column {column}", found[place]));
        }
        let limit = limit(quantity, self.dtype);
        let (whole, row) = relative_errors(width, found, expected);
        self.measure(what.to_owned(), whole, limit.whole);
        self.measure(format!("{what}, worst row"), row, limit.row);
    }

    /// Log-sum-exps: equal infinities, or an absolute error in units of max(1, |expected|).
    pub(super) fn close_lse(&mut self, what: &str, quantity: Quantity, found: &[f32], expected: &[f64]) {
        if found.len() != expected.len() {
            return self.holds(what, false, || format!("has {} elements, not {}", found.len(), expected.len()));
        }
        let error = |(&found, &expected): (&f32, &f64)| {
            let found = f64::from(found);
            if found == expected {
                return 0.0;
            }
            let error = (found - expected).abs() / expected.abs().max(1.0);
            if error.is_nan() { f64::INFINITY } else { error }
        };
        let worst = found.iter().zip(expected).map(error).fold(0.0, f64::max);
        self.measure(what.to_owned(), worst, limit(quantity, self.dtype).row);
    }

    /// The same bytes, numbers or choices.
    pub(super) fn equal<T: PartialEq>(&mut self, what: &str, found: &[T], expected: &[T]) {
        let differing = found.iter().zip(expected).filter(|(a, b)| a != b).count();
        let same = found.len() == expected.len() && differing == 0;
        self.holds(what, same, || {
            format!("differs in {differing} of {} elements ({} expected)", found.len(), expected.len())
        });
    }

    /// Poison that nobody wrote to: every element is not a number.
    pub(super) fn poisoned(&mut self, what: &str, found: &[f32]) {
        let written = found.iter().filter(|value| !value.is_nan()).count();
        self.holds(what, written == 0 && !found.is_empty(), || {
            format!("{written} of {} elements are no longer poison", found.len())
        });
    }

    /// A refusal: the op must fail, and not by lack of support, for then nothing was checked.
    pub(super) fn refused<T>(&mut self, what: &str, result: Result<T, BackendError>) {
        let (refused, how) = match result {
            Ok(_) => (false, "was accepted".to_owned()),
            Err(BackendError::Unsupported(reason)) => (false, format!("gave 'not supported' ({reason})")),
            Err(_) => (true, String::new()),
        };
        self.holds(what, refused, || how);
    }

    /// A plain fact, with how it fails.
    pub(super) fn holds(&mut self, what: &str, fact: bool, how: impl FnOnce() -> String) {
        self.count += 1;
        if !fact {
            self.failures.push(format!("{what} {}", how()));
        }
    }

    fn measure(&mut self, what: String, error: f64, limit: f64) {
        self.count += 1;
        let limit = limit * self.slack;
        // Written so that an error that is not a number fails too.
        let within = error <= limit;
        if !within {
            self.failures.push(format!("{what}: error {error:.2e}, limit {limit:.2e}"));
        }
        if self.worst.as_ref().is_none_or(|worst| error / limit > worst.error / worst.limit) {
            self.worst = Some(Measure { what, error, limit });
        }
    }

    /// Closes the case; `result` is what its body returned.
    pub(super) fn finish(mut self, name: String, result: Result<(), BackendError>) -> CaseReport {
        let mut reason = None;
        match result {
            Ok(()) if self.count == 0 => self.failures.push("made no check".into()),
            Ok(()) => {}
            Err(BackendError::Unsupported(what)) => reason = Some(what),
            Err(error) => self.failures.push(format!("stopped: {error}")),
        }
        let outcome = match reason {
            _ if !self.failures.is_empty() => Outcome::Failed(self.failures),
            Some(reason) => Outcome::NotRun(reason),
            None => Outcome::Passed,
        };
        CaseReport { name, outcome, checks: self.count, worst: self.worst }
    }
}

/// Relative L2 error of the whole, and of the worst row. A row much smaller than the rest is measured against a tenth of
/// the typical row: its own size is what cancellation left over, and says nothing about the op.
fn relative_errors(width: usize, found: &[f32], expected: &[f64]) -> (f64, f64) {
    let rows = found.chunks(width).zip(expected.chunks(width)).map(|(found, expected)| {
        let error: f64 = found.iter().zip(expected).map(|(&a, b)| (f64::from(a) - b).powi(2)).sum();
        (error, expected.iter().map(|b| b * b).sum::<f64>())
    });
    let rows: Vec<(f64, f64)> = rows.collect();
    let error: f64 = rows.iter().map(|row| row.0).sum();
    let norm: f64 = rows.iter().map(|row| row.1).sum();
    let typical = norm / rows.len().max(1) as f64;
    let ratio = |error: f64, norm: f64| if error == 0.0 { 0.0 } else { (error / norm).sqrt() };
    let worst = rows.iter().map(|row| ratio(row.0, row.1.max(0.01 * typical))).fold(0.0, f64::max);
    (ratio(error, norm), worst)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(fill: impl FnOnce(&mut Checks)) -> Outcome {
        let mut checks = Checks::new(DType::Fp32);
        fill(&mut checks);
        checks.finish("case".into(), Ok(())).outcome
    }

    fn failed(fill: impl FnOnce(&mut Checks)) -> bool {
        matches!(outcome(fill), Outcome::Failed(_))
    }

    #[test]
    fn errors_are_relative_to_the_expected_norm() {
        let (whole, row) = relative_errors(2, &[3.0, 4.0, 0.0, 6.0], &[3.0, 4.0, 0.0, 5.0]);
        assert!((whole - 1.0 / 50.0_f64.sqrt()).abs() < 1e-12, "{whole}");
        assert!((row - 0.2).abs() < 1e-12, "{row}");
        assert_eq!(relative_errors(1, &[0.0], &[0.0]), (0.0, 0.0));
        assert_eq!(relative_errors(1, &[1.0], &[0.0]).0, f64::INFINITY);
    }

    #[test]
    fn a_small_error_passes_and_a_large_one_fails() {
        assert!(!failed(|c| c.close("x", Quantity::Product, 2, &[1.0, 2.000_001], &[1.0, 2.0])));
        assert!(failed(|c| c.close("x", Quantity::Product, 2, &[1.0, 2.001], &[1.0, 2.0])));
        assert!(failed(|c| c.close("x", Quantity::Product, 2, &[1.0], &[1.0, 2.0])));
        assert!(failed(|c| c.close("x", Quantity::Product, 2, &[0.0, 1e-3], &[0.0, 0.0])));
    }

    #[test]
    fn one_bad_row_among_many_fails() {
        let expected = vec![1.0; 4000];
        let mut found = vec![1.0_f32; 4000];
        found[7] = 1.0003;
        assert!(failed(|c| c.close("x", Quantity::Product, 4, &found, &expected)));
    }

    #[test]
    fn what_is_not_a_number_fails() {
        assert!(failed(|c| c.close("x", Quantity::Product, 1, &[f32::NAN], &[1.0])));
        assert!(failed(|c| c.close("x", Quantity::Product, 1, &[f32::INFINITY], &[1.0])));
        assert!(failed(|c| c.close_lse("l", Quantity::LogSumExp, &[f32::NAN], &[1.0])));
        assert!(failed(|c| c.close_lse("l", Quantity::LogSumExp, &[f32::NEG_INFINITY], &[1.0])));
        assert!(failed(|c| c.close_lse("l", Quantity::LogSumExp, &[1.0], &[f64::NEG_INFINITY])));
        assert!(!failed(|c| c.close_lse("l", Quantity::LogSumExp, &[f32::NEG_INFINITY], &[f64::NEG_INFINITY])));
    }

    #[test]
    fn poison_is_kept_only_if_all_of_it_is() {
        assert!(!failed(|c| c.poisoned("slot", &[f32::NAN, f32::NAN])));
        assert!(failed(|c| c.poisoned("slot", &[f32::NAN, 0.0])));
        assert!(failed(|c| c.poisoned("slot", &[])));
    }

    #[test]
    fn lack_of_support_is_neither_passed_nor_a_refusal() {
        let unsupported = || BackendError::Unsupported("head_dim 32".into());
        let checks = Checks::new(DType::Fp32);
        assert_eq!(checks.finish("c".into(), Err(unsupported())).outcome, Outcome::NotRun("head_dim 32".into()));
        assert!(failed(|c| c.refused("wrong shape", Err::<(), _>(unsupported()))));
        assert!(failed(|c| c.refused("wrong shape", Ok(()))));
        assert!(!failed(|c| c.refused("wrong shape", Err::<(), _>(BackendError::shape("w", &[1], &[2])))));
        assert!(failed(|_| ()), "a case without a check shows nothing");
    }
}
