//! Compiled CUDA kernels as bytes: one image for each source and architecture, and what the assembler said each kernel
//! uses. It launches nothing and knows no driver; without the feature `cuda` the tables are empty.

/// Machine code of one kernel source for one architecture.
#[derive(Debug, Clone, Copy)]
pub struct Image {
    /// Name of the source, e.g. "kda_recurrent".
    pub module: &'static str,
    /// Compute capability as the compiler writes it, e.g. "90a".
    pub architecture: &'static str,
    /// A cubin, aligned for the loader.
    pub bytes: &'static [u8],
}

/// What one kernel uses, for the test that keeps hot kernels free of local memory.
#[derive(Debug, Clone, Copy)]
pub struct Resources {
    /// Name of the source.
    pub module: &'static str,
    /// Compute capability as the compiler writes it.
    pub architecture: &'static str,
    /// Name of the kernel.
    pub kernel: &'static str,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of stack frame of a thread.
    pub stack: u32,
    /// Bytes spilled to and read back from local memory.
    pub spills: u32,
}

/// The loader reads 8-byte words of an image in place.
#[cfg(feature = "cuda")]
#[repr(C, align(64))]
struct Aligned<T>(T);

mod tables {
    #[cfg(feature = "cuda")]
    use super::Aligned;
    use super::{Image, Resources};
    include!(concat!(env!("OUT_DIR"), "/images.rs"));
}

/// All images.
pub fn images() -> &'static [Image] {
    tables::IMAGES
}

/// What all kernels use.
pub fn resources() -> &'static [Resources] {
    tables::RESOURCES
}

/// Whether an image for `architecture` runs on a device of this compute capability: "90a" on 9.0 alone, "80" on 8.x from
/// 8.0 up.
pub fn runs_on(architecture: &str, major: u32, minor: u32) -> bool {
    let exact = architecture.ends_with(|last: char| last.is_ascii_alphabetic());
    let digits = architecture.trim_end_matches(|last: char| last.is_ascii_alphabetic());
    let Ok(number) = digits.parse::<u32>() else { return false };
    if exact { number == major * 10 + minor } else { number / 10 == major && number % 10 <= minor }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_runs_within_its_family() {
        assert!(runs_on("90a", 9, 0));
        assert!(!runs_on("90a", 10, 0));
        assert!(runs_on("80", 8, 9));
        assert!(!runs_on("86", 8, 0));
        assert!(!runs_on("", 8, 0));
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn no_kernel_uses_local_memory() {
        assert!(!resources().is_empty());
        let offenders: Vec<_> = resources().iter().filter(|kernel| kernel.stack > 0 || kernel.spills > 0).collect();
        assert!(offenders.is_empty(), "stack frames or spills: {offenders:#?}");
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn every_image_is_an_aligned_elf() {
        for image in images() {
            assert_eq!(&image.bytes[..4], b"\x7fELF", "{}", image.module);
            assert_eq!(image.bytes.as_ptr() as usize % 64, 0, "{}", image.module);
        }
    }
}
