//! What `perigee score` refuses: checkpoints that are not what their configuration says, files that do not fit, and wrong
//! usage. The exit code is 1, or 2 for usage; the message names what, what was expected and what was found; no output file
//! appears.

use std::path::PathBuf;
use std::process::Output;

use perigee_testkit::checkpoints::{self, Editable};
use perigee_testkit::{GoldenCase, Tensor, Tensors, tensors};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::binary::{perigee, score, text};

const WEIGHTS: &str = "model.safetensors";

/// A sound checkpoint with prompts, to be broken.
struct Bench {
    folder: TempDir,
    model: Editable,
    prompts: PathBuf,
}

impl Bench {
    /// A small random model.
    fn small() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("source");
        checkpoints::write_random(&source, &checkpoints::small_config(), 3).unwrap();
        let model = checkpoints::copy(&source, &folder.path().join("model")).unwrap();
        Self::with(folder, model)
    }

    /// A committed case whose weights are in two files.
    fn sharded() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let case = GoldenCase::committed("groups").unwrap();
        let model = checkpoints::copy(&case.directory, &folder.path().join("model")).unwrap();
        Self::with(folder, model)
    }

    fn with(folder: TempDir, model: Editable) -> Self {
        let prompts = folder.path().join("prompts.safetensors");
        checkpoints::write_prompts(&prompts, 131, &[3]).unwrap();
        Self { folder, model, prompts }
    }

    fn out(&self) -> PathBuf {
        self.folder.path().join("out.safetensors")
    }

    fn score(&self, more: &[&str]) -> Output {
        score(&self.model.directory.display().to_string(), &self.prompts, &self.out()).args(more).output().unwrap()
    }

    /// Scores, and wants exit code 1 and a message with all these parts.
    fn refused(&self, more: &[&str], parts: &[&str]) {
        let output = self.score(more);
        let message = text(&output);
        assert_eq!(output.status.code(), Some(1), "{parts:?}: {message}");
        for part in parts {
            assert!(message.contains(part), "expected {part:?} in: {message}");
        }
        assert!(!message.contains("panicked"), "{message}");
        assert!(!self.out().exists(), "an output was written all the same: {message}");
    }
}

/// A broken weight file.
fn weights_refused(parts: &[&str], damage: impl FnOnce(&Editable)) {
    let bench = Bench::small();
    damage(&bench.model);
    bench.refused(&[], parts);
}

/// A configuration with one key changed.
fn config_refused(pointer: &str, value: Value, parts: &[&str]) {
    let bench = Bench::small();
    let edit = |config: &mut Value| *config.pointer_mut(pointer).unwrap() = value;
    bench.model.config(edit).unwrap();
    bench.refused(&[], parts);
}

#[test]
fn sound_checkpoints_are_not_refused() {
    for bench in [Bench::small(), Bench::sharded()] {
        let output = bench.score(&["--tp=2"]);
        assert!(output.status.success() && bench.out().exists(), "{}", text(&output));
    }
}

#[test]
fn a_missing_tensor() {
    weights_refused(&["tensor model.norm.weight: expected BF16 [48], found no such tensor"], |model| {
        let rename = |header: &mut serde_json::Map<String, Value>| {
            let entry = header.remove("model.norm.weight").unwrap();
            header.insert("model.normal.weight".into(), entry);
        };
        model.header(WEIGHTS, rename).unwrap();
    });
}

#[test]
fn an_extra_tensor() {
    weights_refused(&["tensor extra.weight: expected no such tensor", "found F32 [2]"], |model| {
        let mut end = 0;
        let add = |header: &mut serde_json::Map<String, Value>| {
            let ends = header.values().filter_map(|entry| entry["data_offsets"][1].as_u64());
            end = ends.max().unwrap();
            let entry = json!({"dtype": "F32", "shape": [2], "data_offsets": [end, end + 8]});
            header.insert("extra.weight".into(), entry);
        };
        model.header(WEIGHTS, add).unwrap();
        model.bytes(WEIGHTS, |bytes| Ok([bytes, &[0; 8]].concat())).unwrap();
    });
}

#[test]
fn a_tensor_of_another_shape() {
    weights_refused(&["tensor lm_head.weight: expected BF16 [131, 48], found BF16 [48, 131]"], |model| {
        model.header(WEIGHTS, |header| header["lm_head.weight"]["shape"] = json!([48, 131])).unwrap();
    });
}

#[test]
fn a_tensor_of_another_type() {
    let name = "model.layers.0.self_attn.q_proj.weight";
    weights_refused(&[&format!("tensor {name}: expected BF16 [96, 48], found F16 [96, 48]")], |model| {
        model.header(WEIGHTS, |header| header[name]["dtype"] = json!("F16")).unwrap();
    });
}

#[test]
fn a_truncated_file() {
    weights_refused(&[WEIGHTS, "expected", "found"], |model| {
        model.bytes(WEIGHTS, |bytes| Ok(bytes[..bytes.len() - 10].to_vec())).unwrap();
    });
    weights_refused(&[WEIGHTS, "expected", "found"], |model| {
        model.bytes(WEIGHTS, |bytes| Ok(bytes[..100].to_vec())).unwrap();
    });
    weights_refused(&[WEIGHTS, "expected", "found"], |model| {
        model.bytes(WEIGHTS, |_| Ok(Vec::new())).unwrap();
    });
}

#[test]
fn a_file_that_lies_about_itself() {
    weights_refused(&[WEIGHTS, "expected", "found"], |model| {
        let lie = |bytes: &[u8]| Ok([&u64::MAX.to_le_bytes(), &bytes[8..]].concat());
        model.bytes(WEIGHTS, lie).unwrap();
    });
    weights_refused(&[WEIGHTS, "lm_head.weight"], |model| {
        model.header(WEIGHTS, |header| header["lm_head.weight"]["data_offsets"] = json!([0, u64::MAX])).unwrap();
    });
}

#[test]
fn shards_that_do_not_fit_their_index() {
    const INDEX: &str = "model.safetensors.index.json";
    let edit_index = |model: &Editable, edit: &dyn Fn(&mut Value)| {
        let change = |bytes: &[u8]| {
            let mut index = serde_json::from_slice(bytes)?;
            edit(&mut index);
            Ok(serde_json::to_vec(&index)?)
        };
        model.bytes(INDEX, change).unwrap();
    };
    let bench = Bench::sharded();
    edit_index(&bench.model, &|index| {
        let second = index["weight_map"]["lm_head.weight"].clone();
        let files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
        let other = files.iter().find(|file| **file != second).unwrap();
        index["weight_map"]["lm_head.weight"] = json!(other);
    });
    bench.refused(&[], &["lm_head.weight", "expected", "found"]);

    let bench = Bench::sharded();
    edit_index(&bench.model, &|index| index["weight_map"]["lm_head.weight"] = json!("../elsewhere.safetensors"));
    bench.refused(&[], &["elsewhere.safetensors"]);

    let bench = Bench::sharded();
    std::fs::remove_file(bench.model.directory.join("model-00002-of-00002.safetensors")).unwrap();
    bench.refused(&[], &["model-00002-of-00002.safetensors"]);
}

#[test]
fn missing_files_and_names() {
    let bench = Bench::small();
    std::fs::remove_file(bench.model.directory.join(WEIGHTS)).unwrap();
    bench.refused(&[], &["expected model.safetensors or model.safetensors.index.json, found neither"]);
    std::fs::remove_file(bench.model.directory.join("config.json")).unwrap();
    bench.refused(&[], &["config.json: cannot read"]);
    std::fs::remove_dir_all(&bench.model.directory).unwrap();
    bench.refused(&[], &["config.json: cannot read"]);
    let output = score("random:huge", &bench.prompts, &bench.out()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("expected a preset out of tiny, wide, 48b, 48b-e16, found \"huge\""));
}

#[test]
fn configurations_that_are_not_run() {
    config_refused(
        "/rope_scaling",
        json!({"type": "yarn"}),
        &["rope_scaling: expected null, found {\"type\":\"yarn\"}"],
    );
    config_refused("/mla_use_nope", json!(false), &["mla_use_nope: expected true, found false"]);
    config_refused("/hidden_act", json!("gelu"), &["hidden_act: expected \"silu\", found \"gelu\""]);
    config_refused("/moe_router_activation_func", json!("softmax"), &["expected \"sigmoid\", found \"softmax\""]);
    config_refused("/num_key_value_heads", json!(2), &["num_key_value_heads: expected 4", "found 2"]);
    config_refused("/linear_attn_config/full_attn_layers", json!([2, 3]), &["full_attn_layers", "layer 3 also in"]);
    config_refused("/linear_attn_config/kda_layers", json!([1]), &["kda_layers", "layer 3 in neither"]);
    config_refused("/hidden_size", json!(-4), &["hidden_size: expected an integer", "found -4"]);
    config_refused("/vocab_size", json!(132), &["expected BF16 [132, 48], found BF16 [131, 48]"]);
    weights_refused(&["config.json: not valid JSON"], |model| {
        model.bytes("config.json", |bytes| Ok(bytes[..bytes.len() / 2].to_vec())).unwrap();
    });
}

#[test]
fn ranks_that_do_not_divide_the_model() {
    let bench = Bench::small();
    bench.refused(&["--tp=3"], &["tensor-parallel degree 3 does not divide KDA heads", "multiple of 3, found 4"]);
    bench.refused(&["--tp=8"], &["tensor-parallel degree 8 does not divide", "multiple of 8, found 4"]);
}

#[test]
fn inputs_that_do_not_fit() {
    let bench = Bench::small();
    let file = bench.folder.path().join("other.safetensors");
    let path = file.display().to_string();
    let write = |name: &str, tensor: Tensor| tensors::write(&file, &Tensors::from([(name.into(), tensor)])).unwrap();
    let run = |parts: &[&str]| {
        let output = score(&bench.model.directory.display().to_string(), &file, &bench.out()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", text(&output));
        parts.iter().for_each(|part| assert!(text(&output).contains(part), "{part}: {}", text(&output)));
    };
    write("prompt_4", Tensor::integers(&[2], vec![3, 131]));
    run(&["prompt_4: token 131 is outside of the vocabulary of 131"]);
    write("prompt_4", Tensor::integers(&[2], vec![3, -1]));
    run(&["prompt_4: expected an id, found -1"]);
    write("prompt_4", Tensor::integers(&[0], Vec::new()));
    run(&["prompt_4: expected at least one token, found none"]);
    write("prompt_4", Tensor::floats(&[1], vec![3.0]));
    run(&["prompt_4: expected int64 or int32, found F32"]);
    write("text", Tensor::integers(&[1], vec![3]));
    run(&[&path, "no tensor named prompt_<i>"]);
    std::fs::write(&file, b"not a safetensors file").unwrap();
    run(&[&path, "not a safetensors file"]);
    bench.refused(&["--feed", "/nowhere/feed"], &["/nowhere/feed"]);
    write("greedy_7", Tensor::integers(&[1], vec![3]));
    bench.refused(&["--feed", &path], &[&path, "greedy_0: expected this tensor, found none"]);
    bench.refused(&["--experts", &path], &["experts_0_1: expected rows 0..3 of 2 experts"]);
}

#[test]
fn wrong_usage_has_a_code_of_its_own() {
    let given = ["score", "--tokens=x", "--out=y"];
    for (arguments, part) in [
        (vec![], "Usage"),
        (vec!["scores"], "scores"),
        (vec!["score"], "--tokens"),
        (vec!["score", "--tokens=x"], "--out"),
        ([&given[..], &["--tp=two"]].concat(), "--tp"),
        ([&given[..], &["--tp=0"]].concat(), "--tp"),
        ([&given[..], &["--chunk=0"]].concat(), "--chunk"),
        ([&given[..], &["--segments=0"]].concat(), "--segments"),
        ([&given[..], &["--dtype=fp64"]].concat(), "--dtype"),
        ([&given[..], &["--device=tpu"]].concat(), "expected cpu, cuda or cuda:I,J,.."),
        ([&given[..], &["--colour"]].concat(), "--colour"),
    ] {
        let output = perigee().args(&arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", text(&output));
        assert!(text(&output).contains(part), "{arguments:?}: {}", text(&output));
    }
    let help = perigee().args(["score", "--help"]).output().unwrap();
    assert!(help.status.success() && text(&help).contains("--segments"), "{}", text(&help));
}
