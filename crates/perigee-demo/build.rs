//! Packs the weights for the program: two thirds of their size.

use std::path::PathBuf;
use std::{env, fs};

/// Effort of packing, of 10.
const PACKING: u8 = 9;
const WEIGHTS: &str = "model/model.safetensors";

fn main() {
    if let Err(message) = run() {
        eprintln!("perigee-demo: {message}");
        std::process::exit(1);
    }
}

fn run() -> Result<(), String> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed={WEIGHTS}");
    let out = env::var_os("OUT_DIR").map(PathBuf::from).ok_or("OUT_DIR is not set; build with cargo")?;
    let weights = fs::read(WEIGHTS).map_err(|error| format!("{WEIGHTS}: {error}"))?;
    // The upper halves of bf16 values, sign and exponent, resemble each other; the lower halves resemble nothing.
    let halves = weights.iter().step_by(2).chain(weights.iter().skip(1).step_by(2));
    let halves: Vec<u8> = halves.copied().collect();
    write(out.join("weights.packed"), &miniz_oxide::deflate::compress_to_vec(&halves, PACKING))?;
    write(out.join("weights.length"), weights.len().to_string().as_bytes())
}

fn write(path: PathBuf, bytes: &[u8]) -> Result<(), String> {
    fs::write(&path, bytes).map_err(|error| format!("{}: {error}", path.display()))
}
