//! A comparison's result as a table: a line for each tensor, with what was measured and what is wrong.

use std::collections::BTreeSet;
use std::fmt;

use super::measure::Measured;

/// One tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// The tensor's name.
    pub name: String,
    /// Its kind, the name without numbers.
    pub kind: String,
    /// Differences, where both are float32 of one shape.
    pub measured: Option<Measured>,
    /// Share of rows with the same largest logit, or of equal integers.
    pub top_1: Option<f64>,
    /// What exceeds a limit; empty if the tensor passes.
    pub faults: Vec<String>,
}

impl Line {
    pub(super) fn new(name: &str, kind: &str) -> Self {
        Self { name: name.into(), kind: kind.into(), measured: None, top_1: None, faults: Vec::new() }
    }

    pub(super) fn fault(&mut self, fault: impl Into<String>) {
        self.faults.push(fault.into());
    }
}

/// All tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    lines: Vec<Line>,
}

impl Report {
    pub(super) fn new(lines: Vec<Line>) -> Self {
        Self { lines }
    }

    /// A line for each tensor that was compared or is missing, by name.
    pub fn lines(&self) -> &[Line] {
        &self.lines
    }

    /// Whether there was something to compare and nothing is wrong.
    pub fn passed(&self) -> bool {
        !self.lines.is_empty() && self.lines.iter().all(|line| line.faults.is_empty())
    }

    /// Kinds of the tensors that failed.
    pub fn failed_kinds(&self) -> BTreeSet<&str> {
        self.lines.iter().filter(|line| !line.faults.is_empty()).map(|line| line.kind.as_str()).collect()
    }

    /// Names of the tensors that failed.
    pub fn failed(&self) -> BTreeSet<&str> {
        self.lines.iter().filter(|line| !line.faults.is_empty()).map(|line| line.name.as_str()).collect()
    }

    /// The largest relative L2 among tensors of a kind.
    pub fn worst(&self, kind: &str) -> f64 {
        let measured = self.lines.iter().filter(|line| line.kind == kind).filter_map(|line| line.measured);
        measured.map(|measured| measured.relative).fold(0.0, f64::max)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let header = ("tensor", "rel L2", "max abs", "worst row", "top-1");
        writeln!(out, "{:22} {:>10} {:>10} {:>10} {:>8}  verdict", header.0, header.1, header.2, header.3, header.4)?;
        for line in &self.lines {
            let number = |value: Option<f64>| value.map_or_else(String::new, |value| format!("{value:.2e}"));
            let share = line.top_1.map_or_else(String::new, |share| format!("{:.2}%", share * 100.0));
            let verdict =
                if line.faults.is_empty() { "ok".to_owned() } else { format!("FAIL: {}", line.faults.join(", ")) };
            writeln!(
                out,
                "{:22} {:>10} {:>10} {:>10} {share:>8}  {verdict}",
                line.name,
                number(line.measured.map(|measured| measured.relative)),
                number(line.measured.map(|measured| measured.absolute)),
                number(line.measured.map(|measured| measured.worst_row)),
            )?;
        }
        write!(out, "{}", if self.passed() { "PASS" } else { "FAIL" })
    }
}
