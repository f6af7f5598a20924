//! Judges an engine's output against expected tensors by the limits of tests/cases/README.md. The rules are those of
//! tests/cases/compare.py, tensor by tensor; a test of this crate holds the two to the same verdicts.

mod measure;
mod report;

use perigee_backend::DType;

pub use report::{Line, Report};

use crate::tensors::{Tensor, Tensors, Values};
use measure::{Measured, measure};

/// Reference top-1 over top-2, in logits, that rounding to bfloat16 does not cross.
const CLEAR_MARGIN: f32 = 0.2;

/// What a tensor of one kind may differ by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Relative L2 of the whole tensor.
    pub relative: f64,
    /// Relative L2 of its worst row: a position, or a head of a state.
    pub worst_row: f64,
    /// Largest difference of an element.
    pub absolute: f64,
}

impl Limits {
    /// The limits of a kind of tensor, none where it is not judged in this type.
    pub fn of(kind: &str, dtype: DType) -> Option<Self> {
        let limits = |relative, worst_row, absolute| Some(Self { relative, worst_row, absolute });
        match (dtype, kind) {
            (DType::Fp32, "logits" | "greedy_logits") => limits(1e-5, 3e-5, 1e-4),
            (DType::Fp32, "hidden") => limits(1e-5, 3e-5, f64::INFINITY),
            (DType::Fp32, "kda_state") => limits(2e-5, 3e-5, f64::INFINITY),
            (DType::Bf16, "logits" | "greedy_logits") => limits(0.04, 0.1, 0.4),
            (DType::Bf16, "hidden") => limits(0.04, 0.1, f64::INFINITY),
            (DType::Bf16, "kda_state") => limits(0.06, 0.1, f64::INFINITY),
            _ => None,
        }
    }
}

/// Judges every tensor of `expected`: one that `out` lacks is a fault if this type judges it, tensors that only `out` has
/// are ignored, and prompts are no outputs.
///
/// Integers (greedy tokens, experts) must be identical in float32; a bfloat16 engine runs with forced experts and tokens,
/// so its own are shown and not judged. A case may keep only the last positions of a long prompt's logits. A shorter
/// greedy run is compared with the beginning of the expected one.
pub fn compare(expected: &Tensors, out: &Tensors, dtype: DType) -> Report {
    let mut lines = Vec::new();
    for (name, want) in expected {
        let kind = kind_of(name);
        if kind == "prompt" {
            continue;
        }
        let mut line = Line::new(name, kind);
        match out.get(name) {
            Some(got) => judge(&mut line, got, want, expected, dtype),
            None if dtype == DType::Fp32 || Limits::of(kind, dtype).is_some() => line.fault("missing"),
            None => continue,
        }
        lines.push(line);
    }
    Report::new(lines)
}

fn judge(line: &mut Line, got: &Tensor, want: &Tensor, expected: &Tensors, dtype: DType) {
    let kind = line.kind.clone();
    let prompt = expected.get(&format!("prompt{}", &line.name[kind.len()..]));
    let (mut got, mut want) = (got.clone(), want.clone());
    if kind == "logits" && prompt.is_some_and(|prompt| prompt.rows() == got.rows()) && got.rows() >= want.rows() {
        got = got.slice(got.rows() - want.rows()..got.rows());
    }
    if kind.starts_with("greedy") && (1..want.rows()).contains(&got.rows()) {
        want = want.slice(0..got.rows());
    }
    if got.shape != want.shape {
        line.fault(format!("shape {:?}, expected {:?}", got.shape, want.shape));
        return;
    }
    match (&mut got.values, &want.values, Limits::of(&kind, dtype)) {
        (Values::Floats(values), Values::Floats(wanted), Some(limits)) => {
            let measured = measure(values, wanted, want.width());
            judge_floats(line, &measured, limits);
            if kind.ends_with("logits") {
                judge_choice(line, (values, wanted), want.width(), dtype);
            }
            line.measured = Some(measured);
        }
        (Values::Integers(values), Values::Integers(wanted), _) => {
            if kind.ends_with("experts") {
                values.chunks_mut(want.width().max(1)).for_each(<[i64]>::sort_unstable);
            }
            let equal = values.iter().zip(wanted).filter(|(a, b)| a == b).count();
            line.top_1 = Some(equal as f64 / wanted.len().max(1) as f64);
            if equal < wanted.len() && dtype == DType::Fp32 {
                line.fault("differs");
            }
        }
        _ => line.fault("another type than expected, or a tensor of no known kind"),
    }
}

fn judge_floats(line: &mut Line, measured: &Measured, limits: Limits) {
    if !measured.finite {
        line.fault("NaN or infinity");
    }
    for (label, value, limit) in [
        ("rel L2", measured.relative, limits.relative),
        ("worst row", measured.worst_row, limits.worst_row),
        ("max abs", measured.absolute, limits.absolute),
    ] {
        if value > limit {
            line.fault(format!("{label} > {limit:e}"));
        }
    }
}

/// Compares which token each row would choose.
fn judge_choice(line: &mut Line, (got, want): (&[f32], &[f32]), vocab: usize, dtype: DType) {
    let (mut agree, mut judged_wrong) = (0usize, 0usize);
    let rows = got.chunks_exact(vocab.max(1)).zip(want.chunks_exact(vocab.max(1)));
    let count = rows.len();
    for (got, want) in rows {
        let (choice, margin) = measure::choice(want);
        let same = measure::choice(got).0 == choice;
        agree += usize::from(same);
        judged_wrong += usize::from(!same && (dtype == DType::Fp32 || margin > CLEAR_MARGIN));
    }
    line.top_1 = Some(agree as f64 / count.max(1) as f64);
    if judged_wrong > 0 {
        line.fault(format!("top-1 differs at {judged_wrong} positions"));
    }
}

/// A tensor's kind: its name without numbers.
pub(crate) fn kind_of(name: &str) -> &str {
    name.trim_end_matches(|c: char| c == '_' || c.is_ascii_digit())
}
