//! The conformance suite: every op of [`Backend`] against a float64 reference of its own, written once and run by each
//! backend's tests. README.md beside this file says how; the suite knows no backend and needs no checkpoint.

mod brief;
mod cache;
mod check;
mod draw;
mod experts;
mod harness;
mod kda;
mod kda_bench;
mod loading;
mod mla;
mod mla_bench;
mod mla_others;
mod reference;
mod report;
mod sampling;
mod steps;
mod stream;

use crate::error::Result;
use crate::ops::Backend;
use crate::weights::DType;

pub use brief::{brief_names, is_brief, is_named};
use check::Checks;
pub use report::{CaseReport, Measure, Outcome, Report, assert_all};

/// Opens the backend under test, afresh for every case.
pub trait Factory: 'static {
    /// The backend.
    type B: Backend;
    /// Its name in reports, with the device where there is a choice.
    fn name(&self) -> String;
    /// The activation type that it is opened with; it picks the limits.
    fn activation(&self) -> DType;
    /// A backend alone in its tensor-parallel group, without weights or cache.
    ///
    /// # Errors
    /// Whatever the backend reports; `Unsupported` counts the case as not run.
    fn open(&mut self, spec: &OpenSpec) -> Result<Self::B>;
}

/// Sizes that a backend may want to know when it is opened.
#[derive(Debug, Clone, Copy)]
pub struct OpenSpec {
    /// Most tokens of a step.
    pub max_tokens: usize,
    /// Most rows of a step.
    pub max_rows: usize,
    /// Token ids are below this.
    pub vocab: usize,
}

type Body<F> = Box<dyn Fn(&mut F, &mut Checks) -> Result<()>>;

/// One case: some op under one circumstance.
pub struct Case<F: Factory> {
    name: String,
    body: Body<F>,
}

impl<F: Factory> Case<F> {
    fn new(name: String, body: impl Fn(&mut F, &mut Checks) -> Result<()> + 'static) -> Self {
        Self { name, body: Box::new(body) }
    }

    /// `op/what/variant`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs the case on a backend of its own.
    pub fn run(&self, factory: &mut F) -> CaseReport {
        let checks = Checks::new(factory.activation());
        self.run_with(factory, checks)
    }

    /// The same with no more and no larger steps than it takes to launch what the case launches; see [`is_brief`].
    pub fn run_brief(&self, factory: &mut F) -> CaseReport {
        let checks = Checks::new(factory.activation()).brief();
        self.run_with(factory, checks)
    }

    fn run_with(&self, factory: &mut F, mut checks: Checks) -> CaseReport {
        let result = (self.body)(factory, &mut checks);
        checks.finish(self.name.clone(), result)
    }
}

/// Every case.
pub fn cases<F: Factory>() -> Vec<Case<F>> {
    let mut cases = Vec::new();
    cases.extend(loading::cases());
    cases.extend(stream::cases());
    cases.extend(experts::cases());
    cases.extend(kda::cases());
    cases.extend(mla::cases());
    cases.extend(steps::cases());
    cases.extend(sampling::cases());
    cases.extend(cache::cases());
    cases
}

/// Runs every case.
pub fn run<F: Factory>(factory: &mut F) -> Report {
    run_matching(factory, "")
}

/// Runs the cases whose name begins with `prefix`.
pub fn run_matching<F: Factory>(factory: &mut F, prefix: &str) -> Report {
    run_chosen(factory, |name| name.starts_with(prefix))
}

/// Runs the cases whose name is chosen.
pub fn run_chosen<F: Factory>(factory: &mut F, chosen: impl Fn(&str) -> bool) -> Report {
    let activation = match factory.activation() {
        DType::Fp32 => "fp32",
        DType::Bf16 => "bf16",
    };
    let cases = cases::<F>().into_iter().filter(|case| chosen(case.name()));
    Report { backend: format!("{} {activation}", factory.name()), cases: cases.map(|case| case.run(factory)).collect() }
}
