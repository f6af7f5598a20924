//! Tests of opening a checkpoint: sound ones in one and in several files, the message of every refusal, and damaged
//! bytes at every place of a small one, which must never end in a panic.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{CONFIG_FILE, Checkpoint, INDEX_FILE, WEIGHTS_FILE};
use crate::inventory;
use crate::presets::Preset;
use crate::test_support::{odd_config, written};

/// A tensor taken apart, to be changed and written again.
#[derive(Clone)]
struct Loose {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

type Tensors = BTreeMap<String, Loose>;

/// The tensors of the odd model's checkpoint, read by the safetensors crate.
fn tensors() -> Tensors {
    let directory = written(&odd_config());
    let file = fs::read(directory.path().join(WEIGHTS_FILE)).unwrap();
    let parsed = SafeTensors::deserialize(&file).unwrap();
    let loose =
        |view: TensorView<'_>| Loose { dtype: view.dtype(), shape: view.shape().to_vec(), bytes: view.data().to_vec() };
    parsed.tensors().into_iter().map(|(name, view)| (name, loose(view))).collect()
}

/// A file with these tensors, written by the safetensors crate.
fn file(tensors: &Tensors) -> Vec<u8> {
    let views: BTreeMap<_, _> = tensors
        .iter()
        .map(|(name, loose)| (name, TensorView::new(loose.dtype, loose.shape.clone(), &loose.bytes).unwrap()))
        .collect();
    safetensors::serialize(views, None).unwrap()
}

/// A directory with the odd configuration and these files.
fn directory(files: &[(&str, &[u8])]) -> TempDir {
    let directory = TempDir::new().unwrap();
    fs::write(directory.path().join(CONFIG_FILE), odd_config().to_string()).unwrap();
    for (name, bytes) in files {
        fs::write(directory.path().join(name), bytes).unwrap();
    }
    directory
}

/// The refusal of a directory, with its path shortened to DIR.
fn refusal(directory: &TempDir) -> String {
    let message = Checkpoint::open(directory.path()).unwrap_err().to_string();
    message.replace(&directory.path().display().to_string(), "DIR")
}

/// The refusal of the odd model with changed tensors.
fn refusal_of(change: impl FnOnce(&mut Tensors)) -> String {
    let mut tensors = tensors();
    change(&mut tensors);
    refusal(&directory(&[(WEIGHTS_FILE, &file(&tensors))]))
}

/// The refusal of the odd model with a changed file of weights.
fn refusal_of_file(change: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut bytes = file(&tensors());
    change(&mut bytes);
    refusal(&directory(&[(WEIGHTS_FILE, &bytes)]))
}

/// A file with this header and so many bytes of data.
fn raw_file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

/// Two shards (every second tensor) and their index.
fn sharded() -> ([Tensors; 2], Value) {
    let mut shards = [Tensors::new(), Tensors::new()];
    let mut map = serde_json::Map::new();
    for (number, (name, loose)) in tensors().into_iter().enumerate() {
        map.insert(name.clone(), format!("part-{}.safetensors", number % 2).into());
        shards[number % 2].insert(name, loose);
    }
    (shards, json!({ "metadata": { "total_size": 0 }, "weight_map": map }))
}

fn sharded_directory(shards: &[Tensors; 2], index: &Value) -> TempDir {
    directory(&[
        ("part-0.safetensors", &file(&shards[0])),
        ("part-1.safetensors", &file(&shards[1])),
        (INDEX_FILE, index.to_string().as_bytes()),
    ])
}

fn assert_holds(checkpoint: &Checkpoint, tensors: &Tensors) {
    assert_eq!(inventory::tensors(checkpoint.config()).len(), tensors.len());
    for (name, loose) in tensors {
        assert_eq!(checkpoint.bytes(name), Some(loose.bytes.as_slice()), "{name}");
    }
    assert_eq!(checkpoint.bytes("model.no_such.weight"), None);
}

#[test]
fn one_file_is_read() {
    let tensors = tensors();
    let directory = directory(&[(WEIGHTS_FILE, &file(&tensors))]);
    assert_holds(&Checkpoint::open(directory.path()).unwrap(), &tensors);
}

#[test]
fn shards_are_read() {
    let (shards, index) = sharded();
    let directory = sharded_directory(&shards, &index);
    assert_holds(&Checkpoint::open(directory.path()).unwrap(), &tensors());
}

/// The cases were written by transformers, not by this crate.
#[test]
fn the_committed_cases_are_read() {
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/cases");
    for case in ["tiny", "first_mla", "groups", "q_lora"] {
        let checkpoint = Checkpoint::open(&cases.join(case)).unwrap();
        let bytes = |spec: &inventory::TensorSpec| checkpoint.bytes(&spec.name).unwrap().len() as u64;
        let total: u64 = inventory::tensors(checkpoint.config()).iter().map(bytes).sum();
        assert_eq!(total, inventory::weight_bytes(checkpoint.config(), 0, 1), "{case}");
        if case == "tiny" {
            assert_eq!(*checkpoint.config(), Preset::Tiny.config().unwrap());
        }
    }
}

#[test]
fn a_missing_file_is_refused() {
    let empty = TempDir::new().unwrap();
    assert!(refusal(&empty).starts_with("DIR/config.json: cannot read: No such file"), "{}", refusal(&empty));
    assert_eq!(
        refusal(&directory(&[])),
        "DIR: expected model.safetensors or model.safetensors.index.json, found neither"
    );
    let nested = directory(&[]);
    fs::create_dir(nested.path().join(WEIGHTS_FILE)).unwrap();
    assert_eq!(refusal(&nested), "DIR/model.safetensors: expected a regular file, found something else");
}

#[test]
fn a_wrong_tensor_is_refused_by_name() {
    let norm = "model.norm.weight";
    assert_eq!(
        refusal_of(|tensors| drop(tensors.remove(norm))),
        "tensor model.norm.weight: expected BF16 [8], found no such tensor"
    );
    assert_eq!(
        refusal_of(|tensors| {
            let copy = tensors[norm].clone();
            tensors.insert("model.layers.1.self_attn.g_b_proj.bias".into(), copy);
        }),
        "tensor model.layers.1.self_attn.g_b_proj.bias: expected no such tensor in this configuration, found BF16 [8]"
    );
    assert_eq!(
        refusal_of(|tensors| tensors.get_mut(norm).unwrap().shape = vec![4, 2]),
        "tensor model.norm.weight: expected BF16 [8], found BF16 [4, 2]"
    );
    assert_eq!(
        refusal_of(|tensors| {
            let a_log = tensors.get_mut("model.layers.1.self_attn.A_log").unwrap();
            a_log.shape = vec![4];
        }),
        "tensor model.layers.1.self_attn.A_log: expected F32 [1, 1, 4, 1], found F32 [4]"
    );
    assert_eq!(
        refusal_of(|tensors| tensors.get_mut(norm).unwrap().dtype = Dtype::F16),
        "tensor model.norm.weight: expected BF16 [8], found F16 [8]"
    );
    assert_eq!(
        refusal_of(|tensors| {
            let norm = tensors.get_mut(norm).unwrap();
            norm.dtype = Dtype::F32;
            norm.bytes.resize(32, 0);
        }),
        "tensor model.norm.weight: expected BF16 [8], found F32 [8]"
    );
    assert_eq!(
        refusal_of(|tensors| {
            let bias = tensors.get_mut("model.layers.2.block_sparse_moe.gate.e_score_correction_bias").unwrap();
            bias.dtype = Dtype::BF16;
            bias.bytes.truncate(8);
        }),
        "tensor model.layers.2.block_sparse_moe.gate.e_score_correction_bias: expected F32 [4], found BF16 [4]"
    );
}

#[test]
fn a_truncated_or_overlong_file_is_refused() {
    let length = file(&tensors()).len();
    let header = file(&tensors()).first_chunk().map_or(0, |length| u64::from_le_bytes(*length));
    assert_eq!(
        refusal_of_file(Vec::clear),
        "DIR/model.safetensors: expected at least the 8 bytes of a header length, found 0 bytes"
    );
    assert_eq!(
        refusal_of_file(|bytes| bytes.truncate(7)),
        "DIR/model.safetensors: expected at least the 8 bytes of a header length, found 7 bytes"
    );
    assert_eq!(
        refusal_of_file(|bytes| bytes.truncate(100)),
        format!("DIR/model.safetensors: expected a header of {header} bytes, found 92 bytes after its length")
    );
    let data = length as u64 - 8 - header;
    let message = refusal_of_file(|bytes| bytes.truncate(length - 1));
    assert!(message.contains(&format!("within the file's {} bytes of data, found bytes", data - 1)), "{message}");
    assert_eq!(
        refusal_of_file(|bytes| bytes.push(0)),
        format!(
            "DIR/model.safetensors: expected {data} bytes of data, where the last tensor ends, found {} bytes",
            data + 1
        )
    );
}

#[test]
fn a_lying_header_is_refused() {
    let refusal = |bytes: &[u8]| refusal(&directory(&[(WEIGHTS_FILE, bytes)]));
    let huge = u64::MAX.to_le_bytes();
    assert_eq!(
        refusal(&huge),
        "DIR/model.safetensors: expected a header of at most 100000000 bytes, found 18446744073709551615 as its length"
    );
    let message = refusal(&raw_file("[1]", 0));
    assert!(
        message.starts_with("DIR/model.safetensors: expected a JSON object as header, found invalid type"),
        "{message}"
    );
    let message = refusal(&raw_file("{\"a\":{\"dtype\":\"BF16\",\"shape\":[-1],\"data_offsets\":[0,2]}}", 2));
    assert!(
        message.starts_with(
            "DIR/model.safetensors: expected dtype, shape and data_offsets of tensor a, found invalid value"
        ),
        "{message}"
    );
    let entry = |name: &str, start: u64, end: u64| {
        format!("\"{name}\":{{\"dtype\":\"BF16\",\"shape\":[2],\"data_offsets\":[{start},{end}]}}")
    };
    for (entries, data, message) in [
        (entry("a", 0, 400), 4, "tensor a within the file's 4 bytes of data, found bytes 0 to 400"),
        (entry("a", 4, 0), 4, "tensor a within the file's 4 bytes of data, found bytes 4 to 0"),
        (
            entry("a", 0, 4) + "," + &entry("b", 2, 6),
            6,
            "tensor b at byte 4 of the data, where the one before it ends, found byte 2",
        ),
        (
            entry("a", 0, 4) + "," + &entry("b", 8, 12),
            12,
            "tensor b at byte 4 of the data, where the one before it ends, found byte 8",
        ),
        (entry("a", 0, 4), 6, "4 bytes of data, where the last tensor ends, found 6 bytes"),
    ] {
        assert_eq!(
            refusal(&raw_file(&format!("{{{entries}}}"), data)),
            format!("DIR/model.safetensors: expected {message}")
        );
    }
}

#[test]
fn a_tensor_with_the_wrong_number_of_bytes_is_refused() {
    let bytes = file(&tensors());
    let (length, rest) = bytes.split_first_chunk::<8>().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let mut header: Value = serde_json::from_slice(header).unwrap();
    // The head and the table are neighbours in the file: one gives two of its bytes to the other.
    assert_eq!(header["lm_head.weight"]["data_offsets"][1], header["model.embed_tokens.weight"]["data_offsets"][0]);
    let moved = json!(header["lm_head.weight"]["data_offsets"][1].as_u64().unwrap() - 2);
    header["lm_head.weight"]["data_offsets"][1] = moved.clone();
    header["model.embed_tokens.weight"]["data_offsets"][0] = moved;
    let mut lying = raw_file(&header.to_string(), 0);
    lying.extend_from_slice(data);
    assert_eq!(
        refusal(&directory(&[(WEIGHTS_FILE, &lying)])),
        "tensor model.embed_tokens.weight: expected 176 bytes for BF16 [11, 8], found 178 bytes"
    );
}

#[test]
fn an_index_that_does_not_fit_its_files_is_refused() {
    let (shards, index) = sharded();
    let norm = "model.norm.weight";
    let home = index["weight_map"][norm].as_str().unwrap().to_owned();
    let other = if home == "part-0.safetensors" { "part-1.safetensors" } else { "part-0.safetensors" };
    let other_shard = usize::from(other == "part-1.safetensors");
    let with = |change: &dyn Fn(&mut Value)| {
        let mut index = index.clone();
        change(&mut index);
        refusal(&sharded_directory(&shards, &index))
    };

    let mut shifted = shards.clone();
    shifted[1 - other_shard].remove(norm);
    assert_eq!(
        refusal(&sharded_directory(&shifted, &index)),
        format!("DIR/{home}: expected tensor {norm}, as {INDEX_FILE} says, found no such tensor")
    );
    let mut missing = index.clone();
    missing["weight_map"]["a.b"] = "part-2.safetensors".into();
    let message = refusal(&sharded_directory(&shards, &missing));
    assert!(message.starts_with("DIR/part-2.safetensors: cannot open: No such file"), "{message}");
    assert_eq!(
        with(&|index| index["weight_map"][norm] = other.into()),
        format!("DIR/{home}: expected tensor {norm} here in {INDEX_FILE} too, found it in {other}")
    );
    assert_eq!(
        with(&|index| drop(index["weight_map"].as_object_mut().unwrap().remove(norm))),
        format!("DIR/{home}: expected tensor {norm} here in {INDEX_FILE} too, found it in no file")
    );
    let mut twice = shards.clone();
    let copy = twice[1 - other_shard][norm].clone();
    twice[other_shard].insert(norm.into(), copy);
    // Whichever file is read second is the one that is blamed.
    let message = refusal(&sharded_directory(&twice, &index));
    let expected = match other_shard {
        0 => format!("DIR/{other}: expected tensor {norm} here in {INDEX_FILE} too, found it in {home}"),
        _ => format!("DIR/{other}: expected tensor {norm} in one file, found it in DIR/{home} too"),
    };
    assert_eq!(message, expected);
    for outside in ["../part-0.safetensors", "/etc/passwd", ".", "..", "", "a/b.safetensors", "part-0.safetensors/"] {
        assert_eq!(
            with(&|index| index["weight_map"][norm] = outside.into()),
            format!(
                "DIR/{INDEX_FILE}: expected the name of a file in this directory for tensor {norm}, found {:?}",
                outside
            )
        );
    }
    assert_eq!(
        with(&|index| index["weight_map"] = json!([1])),
        format!("DIR/{INDEX_FILE}: expected an object weight_map, found none")
    );
}

/// Opens the directory after every one of many small damages to a file; each must be accepted or refused, not panic.
/// Returns how many were refused.
fn survive_damage(directory: &Path, name: &str, offsets: impl Iterator<Item = usize>) -> usize {
    let path = directory.join(name);
    let sound = fs::read(&path).unwrap();
    let mut refused = 0;
    for offset in offsets.take_while(|offset| *offset < sound.len()) {
        for damage in [1u8, 0x10, 0x80] {
            let mut bytes = sound.clone();
            bytes[offset] ^= damage;
            fs::write(&path, &bytes).unwrap();
            refused += usize::from(Checkpoint::open(directory).is_err());
        }
        fs::write(&path, &sound[..offset]).unwrap();
        assert!(Checkpoint::open(directory).is_err(), "{name} cut at {offset}");
    }
    fs::write(&path, &sound).unwrap();
    Checkpoint::open(directory).unwrap();
    refused
}

#[test]
fn no_damage_to_the_weights_panics() {
    let bytes = file(&tensors());
    let header = 8 + bytes.first_chunk().map_or(0, |length| u64::from_le_bytes(*length) as usize);
    let directory = directory(&[(WEIGHTS_FILE, &bytes)]);
    // The data can hold anything: there, few places are enough.
    let offsets = (0..16).chain((16..header).step_by(41)).chain((header..).step_by(499));
    let refused = survive_damage(directory.path(), WEIGHTS_FILE, offsets);
    assert!(refused > 300, "only {refused} damages to the header were noticed");
}

#[test]
fn no_damage_to_the_index_panics() {
    let (shards, index) = sharded();
    let directory = sharded_directory(&shards, &index);
    let refused = survive_damage(directory.path(), INDEX_FILE, (0..).step_by(53));
    assert!(refused > 100, "only {refused} damages to the index were noticed");
}

#[test]
fn no_damage_to_the_configuration_panics() {
    let directory = directory(&[(WEIGHTS_FILE, &file(&tensors()))]);
    let refused = survive_damage(directory.path(), CONFIG_FILE, (0..).step_by(5));
    assert!(refused > 100, "only {refused} damages to the configuration were noticed");
}
