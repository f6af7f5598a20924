//! The comparison gives the verdicts of tests/cases/verdicts.json: outputs of `tiny` with one edit each. A Python test holds
//! compare.py to the same file, so that the two judges agree.

use perigee_backend::DType;
use perigee_testkit::{GoldenCase, Tensors, Values, compare};
use serde_json::Value;

/// The largest logit of a row becomes this many times itself.
const RAISED: f32 = 1.001;

#[test]
fn verdicts_are_those_of_the_shared_file() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/cases/verdicts.json");
    let verdicts: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert!(verdicts.len() > 20);
    let case = GoldenCase::committed("tiny").unwrap();
    for verdict in &verdicts {
        let mut out = case.expected.clone();
        edit(&mut out, verdict);
        let dtype = if verdict["dtype"] == "bf16" { DType::Bf16 } else { DType::Fp32 };
        let report = compare(&case.expected, &out, dtype);
        assert_eq!(report.passed(), verdict["passes"].as_bool().unwrap(), "{verdict}\n{report}");
        let table = report.to_string();
        assert!(table.ends_with(if report.passed() { "PASS" } else { "FAIL" }), "{table}");
    }
}

fn edit(out: &mut Tensors, verdict: &Value) {
    let Some(name) = verdict["tensor"].as_str() else { return };
    if verdict["missing"] == true {
        assert!(out.remove(name).is_some());
        return;
    }
    let Some(tensor) = out.get_mut(name) else { panic!("{name} is no tensor of the case") };
    if let Some(rows) = verdict["rows"].as_u64() {
        *tensor = tensor.slice(0..rows as usize);
    }
    let width = tensor.width();
    let whole = 0..tensor.rows() * width;
    let row = verdict["row"].as_u64().map_or(whole, |row| row as usize * width..(row as usize + 1) * width);
    let column = verdict["column"].as_u64().unwrap_or(0) as usize;
    match &mut tensor.values {
        Values::Floats(values) => {
            let values = &mut values[row];
            if let Some(scale) = verdict["scale"].as_f64() {
                values.iter_mut().for_each(|value| *value = (f64::from(*value) * scale) as f32);
            }
            if let Some(add) = verdict["add"].as_f64() {
                values[column] += add as f32;
            }
            if verdict["not_a_number"] == true {
                values[column] = f32::NAN;
            }
            if let Some(choice) = verdict["choose"].as_u64() {
                values[choice as usize] = values.iter().copied().fold(f32::NEG_INFINITY, f32::max) * RAISED;
            }
        }
        Values::Integers(values) => {
            if let Some(add) = verdict["add"].as_i64() {
                values[row.start + column] += add;
            }
            if verdict["reverse"] == true {
                values.chunks_mut(width).for_each(<[i64]>::reverse);
            }
        }
    }
}
