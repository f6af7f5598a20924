//! Compiles every `kernels/<op>/*.cu` to one machine-code image for each architecture and writes the tables that `src/lib.rs`
//! includes: the images and, from the assembler's report, what each kernel uses. Does nothing without the feature `cuda`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;
use std::{env, fs};

type Result<T> = std::result::Result<T, String>;

/// Effort of packing, of 10.
const PACKING: u8 = 9;

const INSTALL: &str = "deploy/cuda/install-nvcc.sh";

fn main() {
    if let Err(message) = run() {
        eprintln!("perigee-kernels: {message}");
        std::process::exit(1);
    }
}

fn run() -> Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    let out = PathBuf::from(variable("OUT_DIR")?);
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return write(
            &out.join("images.rs"),
            "pub(crate) static IMAGES: &[Image] = &[];\npub(crate) static RESOURCES: &[Resources] = &[];\n",
        );
    }
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    println!("cargo:rerun-if-env-changed=PERIGEE_CUDA_ARCHS");
    println!("cargo:rerun-if-env-changed=PERIGEE_CUDA_LINEINFO");
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let sources = root.join("kernels");
    println!("cargo:rerun-if-changed={}", sources.display());
    let nvcc = compiler(&root)?;
    let architectures = env::var("PERIGEE_CUDA_ARCHS").unwrap_or_else(|_| "90a".into());
    let (units, headers) = units(&sources)?;
    let mut jobs = Vec::new();
    for architecture in architectures.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        for unit in &units {
            jobs.push(Job::new(unit, architecture, &out)?);
        }
    }
    compile_all(&nvcc, &sources, &jobs, headers)?;
    write(&out.join("images.rs"), &tables(&jobs)?)
}

/// One source for one architecture.
struct Job {
    source: PathBuf,
    name: String,
    architecture: String,
    image: PathBuf,
    report: PathBuf,
}

impl Job {
    fn new(source: &Path, architecture: &str, out: &Path) -> Result<Self> {
        let name = source.file_stem().and_then(|stem| stem.to_str()).ok_or("a kernel source has no name")?.to_owned();
        Ok(Self {
            source: source.to_owned(),
            image: out.join(format!("{name}.sm_{architecture}.cubin")),
            report: out.join(format!("{name}.sm_{architecture}.txt")),
            name,
            architecture: architecture.to_owned(),
        })
    }

    /// Whether the image is younger than its source and than every header.
    fn is_fresh(&self, headers: SystemTime) -> bool {
        let Ok(built) = modified(&self.image) else { return false };
        self.report.exists() && built > headers && modified(&self.source).is_ok_and(|source| built > source)
    }

    fn compile(&self, nvcc: &Path, include: &Path) -> Result<()> {
        let output = Command::new(nvcc)
            .arg("-cubin")
            .arg(format!("-gencode=arch=compute_{0},code=sm_{0}", self.architecture))
            .args(["-std=c++17", "-O3", "-Xptxas", "-v", "--expt-relaxed-constexpr"])
            .args(env::var_os("CARGO_FEATURE_PLANTED_FAULTS").map(|_| "-DPERIGEE_PLANTED_FAULTS"))
            // Source lines for the checkers and the profiler; they multiply the size of the images.
            .args(env::var_os("PERIGEE_CUDA_LINEINFO").map(|_| "-lineinfo"))
            .arg("-I")
            .arg(include)
            .arg("-o")
            .arg(&self.image)
            .arg(&self.source)
            .output()
            .map_err(|error| format!("cannot run {}: {error}", nvcc.display()))?;
        let report = String::from_utf8_lossy(&output.stderr).into_owned();
        if !output.status.success() {
            let _ = fs::remove_file(&self.image);
            return Err(format!("nvcc failed on {}:\n{report}", self.source.display()));
        }
        write(&self.report, &report)
    }
}

/// Runs stale jobs, as many at a time as cargo allows.
fn compile_all(nvcc: &Path, include: &Path, jobs: &[Job], headers: SystemTime) -> Result<()> {
    let stale: Vec<&Job> = jobs.iter().filter(|job| !job.is_fresh(headers)).collect();
    let width = env::var("NUM_JOBS").ok().and_then(|text| text.parse().ok()).unwrap_or(1usize).max(1);
    for batch in stale.chunks(width) {
        std::thread::scope(|scope| {
            let running: Vec<_> = batch.iter().map(|job| scope.spawn(|| job.compile(nvcc, include))).collect();
            running
                .into_iter()
                .try_for_each(|thread| thread.join().unwrap_or_else(|_| Err("a compile thread failed".into())))
        })?;
    }
    Ok(())
}

/// nvcc of CUDA_HOME, else of the folder that the install script makes.
fn compiler(root: &Path) -> Result<PathBuf> {
    if let Some(home) = env::var_os("CUDA_HOME") {
        let nvcc = PathBuf::from(home).join("bin/nvcc");
        return if nvcc.exists() {
            Ok(nvcc)
        } else {
            Err(format!(
                "CUDA_HOME is set but {} does not exist; unset it and run {INSTALL}, or correct it",
                nvcc.display()
            ))
        };
    }
    let nvcc = root.join("../../.tools/cuda/bin/nvcc");
    println!("cargo:rerun-if-changed={}", nvcc.display());
    if nvcc.exists() {
        return Ok(nvcc);
    }
    Err(format!("feature `cuda` needs nvcc 13.0 or newer: run {INSTALL} once, or set CUDA_HOME to a CUDA toolkit"))
}

/// All sources, sorted, and the time of the youngest header.
fn units(folder: &Path) -> Result<(Vec<PathBuf>, SystemTime)> {
    let mut sources = Vec::new();
    let mut headers = modified(Path::new(&variable("CARGO_MANIFEST_DIR")?).join("build.rs").as_path())?;
    for op in list(folder)?.into_iter().filter(|path| path.is_dir()) {
        for file in list(&op)? {
            match file.extension().and_then(|extension| extension.to_str()) {
                Some("cu") => sources.push(file),
                Some("h" | "cuh") => headers = headers.max(modified(&file)?),
                _ => {}
            }
        }
    }
    sources.sort();
    Ok((sources, headers))
}

/// Rust tables of the images and of the resources named in the reports.
fn tables(jobs: &[Job]) -> Result<String> {
    let mut images = String::from("pub(crate) static IMAGES: &[Image] = &[\n");
    let mut resources = String::from("pub(crate) static RESOURCES: &[Resources] = &[\n");
    for job in jobs {
        let code = fs::read(&job.image).map_err(|error| format!("{}: {error}", job.image.display()))?;
        let packed = job.image.with_extension("packed");
        fs::write(&packed, miniz_oxide::deflate::compress_to_vec(&code, PACKING))
            .map_err(|error| format!("{}: {error}", packed.display()))?;
        images += &format!(
            "    Image {{ module: {:?}, architecture: {:?}, packed: include_bytes!({:?}), bytes: {} }},\n",
            job.name,
            job.architecture,
            packed.display().to_string(),
            code.len()
        );
        let report = fs::read_to_string(&job.report).map_err(|error| format!("{}: {error}", job.report.display()))?;
        for kernel in kernels(&report) {
            resources += &format!(
                "    Resources {{ module: {:?}, architecture: {:?}, kernel: {:?}, registers: {}, stack: {}, spills: {} }},\n",
                job.name, job.architecture, kernel.name, kernel.registers, kernel.stack, kernel.spills
            );
        }
    }
    Ok(format!("{images}];\n{resources}];\n"))
}

#[derive(Default)]
struct Kernel {
    name: String,
    registers: u32,
    stack: u32,
    spills: u32,
}

/// Reads the assembler's lines: "Compiling entry function 'name'", then bytes of stack and spills, then registers.
fn kernels(report: &str) -> Vec<Kernel> {
    let mut found: Vec<Kernel> = Vec::new();
    for line in report.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let name = rest.split('\'').next().unwrap_or_default().to_owned();
            found.push(Kernel { name, ..Kernel::default() });
        }
        let Some(kernel) = found.last_mut() else { continue };
        if line.contains("bytes stack frame") {
            kernel.stack = number_before(line, " bytes stack frame");
            kernel.spills = number_before(line, " bytes spill stores") + number_before(line, " bytes spill loads");
        }
        if line.contains(" registers") {
            kernel.registers = number_before(line, " registers");
        }
    }
    found
}

fn number_before(line: &str, text: &str) -> u32 {
    let Some((before, _)) = line.split_once(text) else { return 0 };
    let digits: String = before.chars().rev().take_while(char::is_ascii_digit).collect();
    digits.chars().rev().collect::<String>().parse().unwrap_or(0)
}

fn variable(name: &str) -> Result<String> {
    env::var(name).map_err(|_| format!("cargo did not set {name}"))
}

fn modified(path: &Path) -> Result<SystemTime> {
    fs::metadata(path).and_then(|data| data.modified()).map_err(|error| format!("{}: {error}", path.display()))
}

fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    entries.map(|entry| entry.map(|entry| entry.path()).map_err(|error| error.to_string())).collect()
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}
