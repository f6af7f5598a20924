//! The conformance suite on the CPU backend, in both activation types and with several threads; and on backends with one
//! planted fault each, which shows that the suite notices. The suite and its limits are perigee-backend's.

mod faulty;

use faulty::{Fault, Faulty};
use perigee_backend::conformance::{
    Factory, OpenSpec, Outcome, assert_all, brief_names, cases, is_brief, is_named, run, run_matching,
};
use perigee_backend::{DType, Result};
use perigee_collectives::Solo;
use perigee_cpu::{CpuBackend, CpuOptions};

struct Cpu(CpuOptions);

impl Factory for Cpu {
    type B = CpuBackend;

    fn name(&self) -> String {
        format!("cpu, threads {}", self.0.threads)
    }

    fn activation(&self) -> DType {
        self.0.activation
    }

    fn open(&mut self, _spec: &OpenSpec) -> Result<CpuBackend> {
        Ok(CpuBackend::new(self.0, Box::new(Solo)))
    }
}

struct Broken {
    cpu: Cpu,
    fault: Fault,
}

impl Factory for Broken {
    type B = Faulty<CpuBackend>;

    fn name(&self) -> String {
        format!("{} with {:?}", self.cpu.name(), self.fault)
    }

    fn activation(&self) -> DType {
        self.cpu.activation()
    }

    fn open(&mut self, spec: &OpenSpec) -> Result<Self::B> {
        Ok(Faulty::new(self.cpu.open(spec)?, self.fault))
    }
}

fn conform(activation: DType) {
    let report = run(&mut Cpu(CpuOptions { activation, threads: 1 }));
    println!("{report}");
    assert_all(&report);
    let (_, _, not_run) = report.counts();
    assert_eq!(not_run, 0, "the reference backend does everything:\n{report}");
}

#[test]
fn float32() {
    conform(DType::Fp32);
}

#[test]
fn bfloat16() {
    conform(DType::Bf16);
}

#[test]
fn float32_on_three_threads() {
    for op in ["logits", "mlp", "moe", "kda_mixer/batch", "mla/batch"] {
        assert_all(&run_matching(&mut Cpu(CpuOptions { activation: DType::Fp32, threads: 3 }), op));
    }
}

/// Every fault, the cases that must notice it, and whether bfloat16 limits are fine enough to.
const FAULTS: [(Fault, &str, bool); 28] = [
    (Fault::NormEpsilon, "kda_mixer/lengths/1x32", true),
    (Fault::TapsReversed, "kda_mixer/lengths/1x32", true),
    (Fault::StateRounded, "kda_mixer/chunks/1x128, conv 4, Open", false),
    (Fault::ReadsWriteSlot, "kda_mixer/transaction/1x32", true),
    (Fault::WritesReadSlot, "kda_mixer/transaction/1x32", true),
    (Fault::FirstLayerOnly, "kda_mixer/lengths/1x32", true),
    (Fault::FirstLayerOnly, "mla/lengths/latent 64", true),
    (Fault::ForgetsSegment, "mla/segments/latent 64", true),
    (Fault::ScaleWithoutRope, "mla/lengths/latent 64", true),
    (Fault::BinaryLogarithm, "mla/lengths/latent 64", true),
    (Fault::ForgetsMerge, "mla/remote parts/latent 64", true),
    (Fault::ForgetsMerge, "mla/merging empty parts", true),
    (Fault::ForgetsBias, "moe/one group", true),
    (Fault::ForgetsGroups, "moe/four groups", true),
    (Fault::ForgetsRenormalisation, "moe/one group", true),
    (Fault::ForgetsScale, "moe/no renormalisation", true),
    (Fault::ReportsForcedExperts, "moe/one group", true),
    (Fault::ShardFromZero, "embed/last shard", true),
    (Fault::FirstLogits, "logits/odd vocabulary", true),
    (Fault::ForgetsResidual, "rms_norm/width 64", true),
    (Fault::KeepsSlots, "state_slots/clear", true),
    (Fault::ZeroesForPoison, "state_slots/clear", true),
    (Fault::KeepsCopies, "latent_pages/copy", true),
    (Fault::KeepsCopies, "state_slots/clear", true),
    (Fault::ExportsFirstPage, "latent_pages/export", true),
    (Fault::ImportsFirstPage, "latent_pages/export", true),
    (Fault::ImportsFirstHeads, "state_slots/head ranges", true),
    (Fault::SumsOwnHeads, "state_slots/sums", true),
];

fn notices(activation: DType) {
    let mut missed = Vec::new();
    for (fault, cases, in_bfloat16) in FAULTS {
        let report = run_matching(&mut Broken { cpu: Cpu(CpuOptions { activation, threads: 1 }), fault }, cases);
        assert!(!report.cases.is_empty(), "no case is named {cases}");
        let noticed = report.cases.iter().all(|case| matches!(case.outcome, Outcome::Failed(_)));
        if !noticed && (activation == DType::Fp32 || in_bfloat16) {
            missed.push(report.to_string());
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

#[test]
fn notices_faults_in_float32() {
    notices(DType::Fp32);
}

#[test]
fn notices_faults_in_bfloat16() {
    notices(DType::Bf16);
}

/// A case that is renamed does not leave the brief suite unnoticed, and brief cases check what they run.
#[test]
fn the_brief_suite_names_cases_that_pass() {
    let cases = cases::<Cpu>();
    for activation in [DType::Fp32, DType::Bf16] {
        for brief in brief_names(activation) {
            assert!(cases.iter().any(|case| is_named(case.name(), brief)), "no case is named {brief}");
        }
    }
    for activation in [DType::Fp32, DType::Bf16] {
        let mut cpu = Cpu(CpuOptions { activation, threads: 1 });
        for case in cases.iter().filter(|case| is_brief(case.name(), activation)) {
            let report = case.run_brief(&mut cpu);
            assert_eq!(report.outcome, Outcome::Passed, "{}", report.name);
        }
    }
}

/// The wrapper itself is innocent.
#[test]
fn a_wrapped_backend_without_a_fault_conforms() {
    let cpu = Cpu(CpuOptions { activation: DType::Fp32, threads: 1 });
    let mut broken = Broken { cpu, fault: Fault::None };
    for cases in ["rms_norm", "embed", "logits", "moe/one group", "kda_mixer/transaction/1x32"] {
        assert_all(&run_matching(&mut broken, cases));
    }
    for cases in ["mla/remote parts/latent 64", "mla/merging", "state_slots", "latent_pages"] {
        assert_all(&run_matching(&mut broken, cases));
    }
}
