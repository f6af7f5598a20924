//! Keeps the committed code in `src/generated/` equal to what the files under `proto/` give. It needs no protoc binary;
//! with PERIGEE_REGENERATE=1 it writes the files instead of comparing them.

use std::{collections::BTreeMap, fs, path::PathBuf};

const PROTOS: [&str; 3] =
    ["perigee/v1/inference.proto", "perigee/v1/cluster.proto", "perigee/internal/v1/replica.proto"];

fn crate_folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// File name to content, of everything that belongs into `src/generated/`.
fn generate() -> BTreeMap<String, Vec<u8>> {
    let mut compiler = protox::Compiler::new([crate_folder().join("../../proto")]).expect("the proto folder opens");
    compiler.include_source_info(true).include_imports(true);
    compiler.open_files(PROTOS).expect("the protos compile");
    let out = tempfile::tempdir().expect("a temporary folder");
    tonic_prost_build::configure()
        .emit_rerun_if_changed(false)
        .codec_path("crate::codec::Codec")
        // A token's event has neither, mostly, and is moved a few times.
        .boxed("perigee.internal.v1.SessionEvent.logprobs")
        .boxed("perigee.internal.v1.SessionEvent.usage")
        .out_dir(out.path())
        .compile_fds(compiler.file_descriptor_set())
        .expect("code generates");

    let mut files: BTreeMap<String, Vec<u8>> = fs::read_dir(out.path())
        .expect("the output folder reads")
        .map(|entry| {
            let path = entry.expect("an entry").path();
            let name = path.file_name().expect("a file name").to_string_lossy().into_owned();
            (name, fs::read(&path).expect("a generated file"))
        })
        .collect();
    // Reflection serves names and types; comments would only make it larger.
    compiler.include_source_info(false);
    files.insert("descriptor.bin".to_owned(), compiler.encode_file_descriptor_set());
    files
}

#[test]
fn committed_code_is_up_to_date() {
    let folder = crate_folder().join("src/generated");
    let generated = generate();
    assert!(generated.len() >= 3, "two packages and a descriptor set, got {:?}", generated.keys());
    if std::env::var_os("PERIGEE_REGENERATE").is_some_and(|value| value == "1") {
        fs::create_dir_all(&folder).expect("the folder exists");
        for (name, content) in &generated {
            fs::write(folder.join(name), content).expect("a generated file is written");
        }
    }
    for (name, content) in &generated {
        let committed = fs::read(folder.join(name)).unwrap_or_default();
        assert!(
            committed == *content,
            "src/generated/{name} is out of date: run PERIGEE_REGENERATE=1 cargo test -p perigee-proto --test generated"
        );
    }
    let committed: Vec<String> = fs::read_dir(&folder)
        .expect("the folder reads")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    for name in committed {
        assert!(generated.contains_key(&name), "src/generated/{name} is generated from nothing: remove it");
    }
}

/// Every message, field, enum value, service and call carries a comment: clients read nothing else.
#[test]
fn every_proto_item_has_a_comment() {
    for proto in PROTOS {
        let text = fs::read_to_string(crate_folder().join("../../proto").join(proto)).expect("the proto reads");
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        for (number, line) in lines.iter().enumerate() {
            let declares =
                ["message ", "enum ", "service ", "rpc ", "oneof "].iter().any(|word| line.starts_with(word))
                    || (line.contains(" = ") && line.ends_with(';') && !line.starts_with("syntax"));
            if declares {
                let before = lines[number - 1];
                assert!(before.starts_with("//"), "{proto}:{}: no comment above {line:?}", number + 1);
            }
        }
    }
}
