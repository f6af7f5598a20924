//! The conformance suite on a GPU, as a program that can be carried to a machine that has one: both activation types, or one,
//! and all cases, or those whose name begins with a prefix or is given whole; or the names of all cases. Exit status 1 when
//! a case failed.
//!
//! usage: conformance [both|fp32|bf16|names] [PREFIX|=NAME]...

use std::process::ExitCode;

use perigee_backend::conformance::{Factory, OpenSpec, cases, run_chosen};
use perigee_backend::{DType, Result};
use perigee_collectives::Solo;
use perigee_cuda::{CudaBackend, Options};

struct Cuda(Options);

impl Factory for Cuda {
    type B = CudaBackend;

    fn name(&self) -> String {
        format!("cuda:{}", self.0.device)
    }

    fn activation(&self) -> DType {
        self.0.precision
    }

    fn open(&mut self, _spec: &OpenSpec) -> Result<CudaBackend> {
        CudaBackend::open(self.0, Box::new(Solo))
    }
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let precisions = match arguments.next().as_deref() {
        None | Some("both") => vec![DType::Fp32, DType::Bf16],
        Some("fp32") => vec![DType::Fp32],
        Some("bf16") => vec![DType::Bf16],
        Some("names") => {
            cases::<Cuda>().iter().for_each(|case| println!("{}", case.name()));
            return ExitCode::SUCCESS;
        }
        Some(other) => {
            eprintln!("conformance: {other:?} is none of both, fp32, bf16, names");
            return ExitCode::from(2);
        }
    };
    let wanted: Vec<String> = arguments.collect();
    let fits = |name: &str, wanted: &str| match wanted.strip_prefix('=') {
        Some(whole) => name == whole,
        None => name.starts_with(wanted),
    };
    let chosen = |name: &str| wanted.is_empty() || wanted.iter().any(|wanted| fits(name, wanted));
    if let Err(error) = perigee_cuda::check(0) {
        eprintln!("conformance: not run: {error}");
        return ExitCode::from(2);
    }
    let mut passed = true;
    for precision in precisions {
        let report = run_chosen(&mut Cuda(Options { device: 0, precision }), chosen);
        println!("{report}");
        if let Err(faults) = report.verdict() {
            eprintln!("{faults}");
            passed = false;
        }
    }
    println!("kernels: {}", perigee_cuda::launched().join(" "));
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
