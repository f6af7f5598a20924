//! How long a replica's decode steps take: a part that is always there, one for each session, one for each token of their
//! contexts, fitted to what it reported. Rows rarely change much, so the fit leans on a guess where they say little.

/// Share that the past keeps with every further report, about one a second.
const KEPT: f64 = 0.97;
/// How many reports the guess is worth.
const GUESS_WEIGHT: f64 = 0.2;
/// The guess: shares of a step that are always there, for the sessions, for their contexts.
const GUESS: [f64; 3] = [0.5, 0.25, 0.25];

/// A step's time as a function of what is in it, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct StepTimes {
    /// Without anybody.
    pub(super) base_ms: f64,
    /// For each session.
    pub(super) row_ms: f64,
    /// For each token of their contexts.
    pub(super) token_ms: f64,
}

impl StepTimes {
    /// Time of a step with so many sessions and tokens in their contexts.
    pub(super) fn of(&self, rows: u64, tokens: u64) -> f64 {
        self.base_ms + self.row_ms * rows as f64 + self.token_ms * tokens as f64
    }

    /// The mean of several; none of none.
    pub(super) fn mean(all: impl Iterator<Item = Self>) -> Option<Self> {
        let (mut sum, mut count) = (Self::default(), 0.0);
        for times in all {
            sum.base_ms += times.base_ms;
            sum.row_ms += times.row_ms;
            sum.token_ms += times.token_ms;
            count += 1.0;
        }
        (count > 0.0).then(|| Self {
            base_ms: sum.base_ms / count,
            row_ms: sum.row_ms / count,
            token_ms: sum.token_ms / count,
        })
    }
}

/// Least squares over reports, older ones counting less: sums over (1, sessions, tokens) and the time.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct StepFit {
    weight: f64,
    squares: [[f64; 3]; 3],
    products: [f64; 3],
    time: f64,
}

impl StepFit {
    /// A replica reported that time of a step with so many sessions and tokens in their contexts.
    pub(super) fn add(&mut self, rows: u64, tokens: u64, step_ms: f64) {
        if rows == 0 || step_ms <= 0.0 || !step_ms.is_finite() {
            return;
        }
        let x = [1.0, rows as f64, tokens as f64];
        self.weight = self.weight * KEPT + 1.0;
        self.time = self.time * KEPT + step_ms;
        for (i, row) in self.squares.iter_mut().enumerate() {
            self.products[i] = self.products[i] * KEPT + x[i] * step_ms;
            row.iter_mut().zip(&x).for_each(|(sum, other)| *sum = *sum * KEPT + x[i] * other);
        }
    }

    /// The times that fit best; none before the first report.
    pub(super) fn times(&self) -> Option<StepTimes> {
        if self.weight <= 0.0 || self.time <= 0.0 {
            return None;
        }
        // In units of the means, so that the guess has the same weight in each of the three.
        let mean_ms = self.time / self.weight;
        let means: [f64; 3] = std::array::from_fn(|i| (self.squares[0][i] / self.weight).max(f64::MIN_POSITIVE));
        let mut matrix = [[0.0; 3]; 3];
        let mut right = [0.0; 3];
        for i in 0..3 {
            right[i] = self.products[i] / means[i] / mean_ms + GUESS_WEIGHT * GUESS[i];
            for j in 0..3 {
                matrix[i][j] = self.squares[i][j] / means[i] / means[j];
            }
            matrix[i][i] += GUESS_WEIGHT;
        }
        let shares = solve(matrix, right).map(|share| share.max(0.0));
        let sum = shares.iter().sum::<f64>();
        let shares = if sum > 0.0 && sum.is_finite() { shares.map(|share| share / sum) } else { GUESS };
        let of = |i: usize| shares[i] * mean_ms / means[i];
        // Contexts that are all empty have no mean to speak of.
        let token_ms = if self.squares[0][2] > 0.0 { of(2) } else { 0.0 };
        Some(StepTimes { base_ms: of(0), row_ms: of(1), token_ms })
    }
}

/// Solves a symmetric positive definite system by elimination.
fn solve(mut matrix: [[f64; 3]; 3], mut right: [f64; 3]) -> [f64; 3] {
    for i in 0..3 {
        let pivot = matrix[i];
        for j in i + 1..3 {
            let factor = matrix[j][i] / pivot[i];
            matrix[j].iter_mut().zip(pivot).for_each(|(value, above)| *value -= factor * above);
            right[j] -= factor * right[i];
        }
    }
    let mut found = [0.0; 3];
    for i in (0..3).rev() {
        let known: f64 = (i + 1..3).map(|j| matrix[i][j] * found[j]).sum();
        found[i] = (right[i] - known) / matrix[i][i];
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fitted(reports: impl Iterator<Item = (u64, u64)>, truth: StepTimes) -> StepTimes {
        let mut fit = StepFit::default();
        reports.for_each(|(rows, tokens)| fit.add(rows, tokens, truth.of(rows, tokens)));
        fit.times().expect("there are reports")
    }

    #[test]
    fn reports_that_vary_tell_the_parts_apart() {
        let truth = StepTimes { base_ms: 12.0, row_ms: 0.5, token_ms: 0.0004 };
        let reports = (0..200u64).map(|i| (1 + i * 7 % 40, 500 + i * 7919 % 60_000));
        let found = fitted(reports, truth);
        for (rows, tokens) in [(1, 1000), (40, 60_000), (20, 2000)] {
            let (is, was) = (truth.of(rows, tokens), found.of(rows, tokens));
            assert!((is - was).abs() < 0.05 * is, "{rows} {tokens}: {was} for {is}; {found:?}");
        }
    }

    #[test]
    fn reports_that_never_vary_are_met_and_split_as_guessed() {
        let truth = StepTimes { base_ms: 20.0, row_ms: 0.0, token_ms: 0.0 };
        let found = fitted((0..50).map(|_| (10, 4000)), truth);
        assert!((found.of(10, 4000) - 20.0).abs() < 0.01, "{found:?}");
        assert!((found.base_ms - 10.0).abs() < 3.0, "{found:?}");
        assert!(found.row_ms > 0.0 && found.token_ms > 0.0, "{found:?}");
    }

    #[test]
    fn nothing_is_negative_and_nothing_comes_of_nothing() {
        assert_eq!(StepFit::default().times(), None);
        let mut fit = StepFit::default();
        fit.add(0, 0, 5.0);
        fit.add(3, 10, 0.0);
        fit.add(3, 10, f64::NAN);
        assert_eq!(fit.times(), None);
        // More sessions, less time: another machine state, not a rule.
        for i in 1..20 {
            fit.add(i, 100, 50.0 - i as f64);
        }
        let found = fit.times().unwrap();
        assert!(found.base_ms >= 0.0 && found.row_ms >= 0.0 && found.token_ms >= 0.0, "{found:?}");
        fit = StepFit::default();
        fit.add(1, 0, 7.0);
        let found = fit.times().unwrap();
        assert!((0.0..=7.1).contains(&found.of(1, 0)), "{found:?}");
        assert_eq!(found.token_ms, 0.0);
    }

    #[test]
    fn the_mean_of_none_is_none() {
        assert_eq!(StepTimes::mean(std::iter::empty()), None);
        let a = StepTimes { base_ms: 1.0, row_ms: 2.0, token_ms: 3.0 };
        let b = StepTimes { base_ms: 3.0, row_ms: 2.0, token_ms: 1.0 };
        assert_eq!(StepTimes::mean([a, b].into_iter()), Some(StepTimes { base_ms: 2.0, row_ms: 2.0, token_ms: 2.0 }));
    }
}
