//! Compiled CUDA kernels as bytes: one image for each source and architecture, packed, and what the assembler said each kernel
//! uses. It launches nothing and knows no driver; without the feature `cuda` the tables are empty.

/// Machine code of one kernel source for one architecture.
#[derive(Debug, Clone, Copy)]
pub struct Image {
    /// Name of the source, e.g. "kda_recurrent".
    pub module: &'static str,
    /// Compute capability as the compiler writes it, e.g. "90a".
    pub architecture: &'static str,
    /// A cubin in the format of RFC 1951: a quarter of its size.
    packed: &'static [u8],
    /// Its size unpacked.
    bytes: usize,
}

/// A cubin, aligned for the loader, which reads 8-byte words of it in place.
#[derive(Debug)]
pub struct Code {
    words: Vec<u64>,
}

impl Code {
    /// The first word, behind which all others lie.
    pub fn as_ptr(&self) -> *const u64 {
        self.words.as_ptr()
    }
}

/// An image of which a byte is not as it was built.
#[derive(Debug)]
pub struct Damaged {
    module: &'static str,
}

impl std::fmt::Display for Damaged {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "the kernels of {} are damaged in this program's file; install it anew", self.module)
    }
}

impl std::error::Error for Damaged {}

impl Image {
    /// The cubin.
    ///
    /// # Errors
    /// [`Damaged`].
    pub fn unpack(&self) -> Result<Code, Damaged> {
        let damaged = |_| Damaged { module: self.module };
        let bytes = miniz_oxide::inflate::decompress_to_vec_with_limit(self.packed, self.bytes).map_err(damaged)?;
        if bytes.len() != self.bytes {
            return Err(Damaged { module: self.module });
        }
        let word = |bytes: &[u8]| {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            u64::from_le_bytes(word)
        };
        Ok(Code { words: bytes.chunks(8).map(word).collect() })
    }
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

mod tables {
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
    fn every_image_unpacks_to_an_elf_and_a_damaged_one_does_not() {
        for image in images() {
            let code = image.unpack().unwrap();
            assert_eq!(&code.words[0].to_le_bytes()[..4], b"\x7fELF", "{}", image.module);
            assert_eq!(code.words.len(), image.bytes.div_ceil(8), "{}", image.module);
            let cut = Image { packed: &image.packed[..image.packed.len() / 2], ..*image };
            let error = cut.unpack().unwrap_err().to_string();
            assert!(error.contains(image.module), "{error}");
        }
    }
}
