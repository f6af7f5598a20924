//! What the suite found: one line for each case, as a table for people and as a verdict for tests. A case that the backend
//! cannot do is 'not run'; it never counts as passed.

use std::fmt;

/// The measured error that came closest to (or went furthest past) its limit.
#[derive(Debug, Clone, PartialEq)]
pub struct Measure {
    /// What was compared.
    pub what: String,
    /// The error, in the measure that the limit is stated in.
    pub error: f64,
    /// The most it may be.
    pub limit: f64,
}

/// How a case ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// Every check held.
    Passed,
    /// These did not, or an op failed.
    Failed(Vec<String>),
    /// The backend said that it does not support the case; its words.
    NotRun(String),
}

/// One case.
#[derive(Debug, Clone, PartialEq)]
pub struct CaseReport {
    /// The case, `op/what/variant`.
    pub name: String,
    /// How it ended.
    pub outcome: Outcome,
    /// Checks made.
    pub checks: usize,
    /// The tightest of its measured errors; none where all checks were exact.
    pub worst: Option<Measure>,
}

/// All cases of one run.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// The backend, as its factory names it, and its activation type.
    pub backend: String,
    /// The cases in the order run.
    pub cases: Vec<CaseReport>,
}

impl Report {
    /// Numbers of cases that passed, failed and were not run.
    pub fn counts(&self) -> (usize, usize, usize) {
        let count = |matching: fn(&Outcome) -> bool| self.cases.iter().filter(|case| matching(&case.outcome)).count();
        (
            count(|outcome| *outcome == Outcome::Passed),
            count(|outcome| matches!(outcome, Outcome::Failed(_))),
            count(|outcome| matches!(outcome, Outcome::NotRun(_))),
        )
    }

    /// Nothing if no case failed and at least one passed; otherwise what is wrong, failure by failure.
    pub fn verdict(&self) -> Result<(), String> {
        let (passed, failed, not_run) = self.counts();
        let mut lines = Vec::new();
        for case in &self.cases {
            if let Outcome::Failed(failures) = &case.outcome {
                lines.extend(failures.iter().map(|failure| format!("{}: {failure}", case.name)));
            }
        }
        if failed > 0 {
            lines.insert(0, format!("{}: {failed} of {} cases failed", self.backend, self.cases.len()));
            return Err(lines.join("\n"));
        }
        if passed == 0 {
            return Err(format!("{}: no case ran ({not_run} not run), so nothing is shown", self.backend));
        }
        Ok(())
    }
}

/// For a backend's own test.
///
/// # Panics
/// Lists the failures where a case failed; also where no case ran at all, which shows nothing.
pub fn assert_all(report: &Report) {
    if let Err(faults) = report.verdict() {
        panic!("{faults}");
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (passed, failed, not_run) = self.counts();
        writeln!(f, "conformance of {}: {passed} passed, {failed} failed, {not_run} not run", self.backend)?;
        let width = self.cases.iter().map(|case| case.name.len()).max().unwrap_or(4).max(4);
        writeln!(f, "{:width$}  {:7}  {:>6}  {:>8}  {:>8}  worst of", "case", "outcome", "checks", "error", "limit")?;
        for case in &self.cases {
            let (word, detail) = match &case.outcome {
                Outcome::Passed => ("passed", String::new()),
                Outcome::Failed(failures) => ("FAILED", failures.join("; ")),
                Outcome::NotRun(reason) => ("not run", reason.clone()),
            };
            let (error, limit, what) = case.worst.as_ref().map_or_else(
                || ("-".to_owned(), "-".to_owned(), ""),
                |worst| (format!("{:.1e}", worst.error), format!("{:.1e}", worst.limit), worst.what.as_str()),
            );
            let note = if detail.is_empty() { what } else { detail.as_str() };
            writeln!(f, "{:width$}  {word:7}  {:>6}  {error:>8}  {limit:>8}  {note}", case.name, case.checks)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(outcomes: Vec<Outcome>) -> Report {
        let case = |outcome| CaseReport { name: "op/case".into(), outcome, checks: 1, worst: None };
        Report { backend: "test fp32".into(), cases: outcomes.into_iter().map(case).collect() }
    }

    #[test]
    fn passes_only_if_something_ran_and_nothing_failed() {
        assert!(report(vec![Outcome::Passed, Outcome::NotRun("no".into())]).verdict().is_ok());
        assert!(report(vec![]).verdict().is_err());
        assert!(report(vec![Outcome::NotRun("no such width".into())]).verdict().is_err());
        let faults = report(vec![Outcome::Passed, Outcome::Failed(vec!["state off".into()])]).verdict().unwrap_err();
        assert!(faults.contains("op/case: state off"), "{faults}");
    }

    #[test]
    #[should_panic(expected = "state off")]
    fn assert_all_lists_failures() {
        assert_all(&report(vec![Outcome::Failed(vec!["state off".into()])]));
    }

    #[test]
    fn the_table_shows_every_outcome() {
        let text = report(vec![Outcome::Passed, Outcome::Failed(vec!["bad".into()]), Outcome::NotRun("no".into())])
            .to_string();
        assert!(text.contains("1 passed, 1 failed, 1 not run"), "{text}");
        assert_eq!(text.lines().count(), 5);
    }
}
