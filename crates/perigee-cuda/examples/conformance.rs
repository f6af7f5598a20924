//! The conformance suite on a GPU, as a program that can be carried to a machine that has one: both activation types, or one;
//! all cases, or those whose name begins with a prefix or is given whole. Exit status 1 when a case failed.
//!
//! usage: conformance [both|fp32|bf16|names|kernels] [--brief] [--part I/N] [--launched FILE] [PREFIX|=NAME]...
//!
//! names prints the cases, kernels the kernels of this program. --brief leaves out cases and steps that launch nothing that
//! others do not, for checkers that make each launch slow; --part runs every Nth case from the Ith of N on, for
//! several processes beside each other; --launched adds to a file what was launched, a kernel a line.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::fs::OpenOptions;
use std::io::Write;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use perigee_backend::conformance::{Case, Factory, OpenSpec, Report, cases, is_brief};
use perigee_backend::{DType, Result};
use perigee_collectives::Solo;
use perigee_cuda::{CudaBackend, LAUNCHES, Program};
use tracing::field::{Field, Visit};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

/// Backends that share the kernels that were loaded for the first.
struct Cuda {
    program: Program,
    precision: DType,
}

impl Factory for Cuda {
    type B = CudaBackend;

    fn name(&self) -> String {
        "cuda:0".into()
    }

    fn activation(&self) -> DType {
        self.precision
    }

    fn open(&mut self, _spec: &OpenSpec) -> Result<CudaBackend> {
        CudaBackend::with_program(&self.program, self.precision, Box::new(Solo))
    }
}

/// Names of the kernels that were launched.
#[derive(Clone, Default)]
struct Launched(Arc<Mutex<BTreeSet<String>>>);

impl<S: tracing::Subscriber> Layer<S> for Launched {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        event.record(&mut self.clone());
    }
}

impl Visit for Launched {
    fn record_debug(&mut self, _: &Field, _: &dyn Debug) {}

    fn record_str(&mut self, field: &Field, name: &str) {
        if field.name() == "kernel" {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
        }
    }
}

/// What the arguments ask for.
struct Wanted {
    what: String,
    is_brief: bool,
    part: (usize, usize),
    launched: Option<String>,
    names: Vec<String>,
}

impl Wanted {
    fn parse(arguments: impl Iterator<Item = String>) -> std::result::Result<Self, String> {
        let mut wanted = Self { what: "both".into(), is_brief: false, part: (0, 1), launched: None, names: Vec::new() };
        let mut arguments = arguments.peekable();
        if let Some(what) = arguments.next_if(|first| !first.starts_with("--")) {
            wanted.what = what;
        }
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--brief" => wanted.is_brief = true,
                "--part" => {
                    let part = arguments.next().unwrap_or_default();
                    let numbers = part.split_once('/').and_then(|(i, n)| i.parse().ok().zip(n.parse().ok()));
                    wanted.part = numbers
                        .filter(|&(i, n): &(usize, usize)| (1..=n).contains(&i))
                        .map(|(i, n)| (i - 1, n))
                        .ok_or_else(|| format!("--part takes I/N with 1 <= I <= N, not {part:?}"))?;
                }
                "--launched" => wanted.launched = Some(arguments.next().ok_or("--launched takes a file")?),
                _ => wanted.names.push(argument),
            }
        }
        Ok(wanted)
    }

    fn precisions(&self) -> std::result::Result<Vec<DType>, String> {
        match self.what.as_str() {
            "both" => Ok(vec![DType::Fp32, DType::Bf16]),
            "fp32" => Ok(vec![DType::Fp32]),
            "bf16" => Ok(vec![DType::Bf16]),
            other => Err(format!("{other:?} is none of both, fp32, bf16, names, kernels")),
        }
    }

    /// The cases to run with an activation type, without regard to parts.
    fn cases(&self, precision: DType) -> Vec<Case<Cuda>> {
        let fits = |name: &str, wanted: &String| match wanted.strip_prefix('=') {
            Some(whole) => name == whole,
            None => name.starts_with(wanted.as_str()),
        };
        let is_chosen = |name: &str| self.names.is_empty() || self.names.iter().any(|wanted| fits(name, wanted));
        cases()
            .into_iter()
            .filter(|case| is_chosen(case.name()) && (!self.is_brief || is_brief(case.name(), precision)))
            .collect()
    }
}

/// Runs what is wanted, prints each case as it ends and then the tables; whether nothing failed.
fn run(wanted: &Wanted, program: &Program) -> std::result::Result<bool, String> {
    let (mut number, mut passed) = (0, true);
    for precision in wanted.precisions()? {
        let mut factory = Cuda { program: program.clone(), precision };
        let mut report = Report { backend: format!("cuda:0 {precision:?}").to_lowercase(), cases: Vec::new() };
        for case in wanted.cases(precision) {
            number += 1;
            if (number - 1) % wanted.part.1 != wanted.part.0 {
                continue;
            }
            let began = Instant::now();
            report.cases.push(if wanted.is_brief { case.run_brief(&mut factory) } else { case.run(&mut factory) });
            eprintln!("{:7.2} s {precision:?} {}", began.elapsed().as_secs_f64(), case.name());
        }
        println!("{report}");
        if let (Err(faults), false) = (report.verdict(), report.cases.is_empty()) {
            eprintln!("{faults}");
            passed = false;
        }
    }
    if number == 0 { Err("no case has such a name".into()) } else { Ok(passed) }
}

fn note(launched: &Launched, file: &str) -> std::io::Result<()> {
    let names = launched.0.lock().unwrap_or_else(PoisonError::into_inner);
    let lines: String = names.iter().map(|name| format!("{name}\n")).collect();
    OpenOptions::new().create(true).append(true).open(file)?.write_all(lines.as_bytes())
}

fn main() -> ExitCode {
    let refuse = |error: &str| {
        eprintln!("conformance: {error}");
        ExitCode::from(2)
    };
    let wanted = match Wanted::parse(std::env::args().skip(1)) {
        Ok(wanted) => wanted,
        Err(error) => return refuse(&error),
    };
    match wanted.what.as_str() {
        "names" => {
            wanted.cases(DType::Bf16).iter().for_each(|case| println!("{}", case.name()));
            return ExitCode::SUCCESS;
        }
        "kernels" => {
            let names: BTreeSet<_> = perigee_kernels::resources().iter().map(|kernel| kernel.kernel).collect();
            names.iter().for_each(|name| println!("{name}"));
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    let launched = Launched::default();
    let events = Targets::new().with_target(LAUNCHES, LevelFilter::DEBUG);
    let subscriber = tracing_subscriber::registry().with(events).with(launched.clone());
    if let Err(error) = tracing::subscriber::set_global_default(subscriber) {
        return refuse(&error.to_string());
    }
    let program = match Program::load(0) {
        Ok(program) => program,
        Err(error) => return refuse(&format!("not run: {error}")),
    };
    let passed = match run(&wanted, &program) {
        Ok(passed) => passed,
        Err(error) => return refuse(&error),
    };
    if let Some(Err(error)) = wanted.launched.as_ref().map(|file| note(&launched, file)) {
        return refuse(&format!("writing what was launched: {error}"));
    }
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
