//! The CUDA backend: the ops of [`perigee_backend::Backend`] on one NVIDIA GPU. Driver and cuBLAS are loaded at run time, so
//! a program with this crate starts anywhere and says why a GPU cannot be used. Built without the feature `cuda` the crate
//! holds only that message. It schedules nothing and knows no model.

#[cfg(feature = "cuda")]
mod backend;
#[cfg(feature = "cuda")]
mod blas;
#[cfg(feature = "cuda")]
mod buffer;
#[cfg(feature = "cuda")]
mod cache;
#[cfg(feature = "cuda")]
mod device;
#[cfg(feature = "cuda")]
mod exchange;
#[cfg(feature = "cuda")]
mod expand;
#[cfg(feature = "cuda")]
mod formula;
#[cfg(feature = "cuda")]
mod graph;
#[cfg(feature = "cuda")]
mod ipc;
#[cfg(feature = "cuda")]
mod kernels;
mod ladder;
#[cfg(feature = "cuda")]
mod loader;
#[cfg(feature = "cuda")]
mod measure;
#[cfg(feature = "cuda")]
mod module;
#[cfg(feature = "cuda")]
mod nccl;
mod needs;
#[cfg(feature = "cuda")]
mod ops;
#[cfg(feature = "cuda")]
mod params;
#[cfg(feature = "cuda")]
mod reader;
#[cfg(feature = "cuda")]
mod recorder;
#[cfg(feature = "cuda")]
mod scratch;
#[cfg(feature = "cuda")]
mod step;
#[cfg(feature = "cuda")]
mod stream;
#[cfg(feature = "cuda")]
mod tensor;
#[cfg(feature = "cuda")]
mod tensor_map;
#[cfg(feature = "cuda")]
mod transfer;
#[cfg(feature = "cuda")]
mod tuning;

#[cfg(feature = "cuda")]
pub use backend::{CudaBackend, Options};
#[cfg(feature = "cuda")]
pub use device::{DeviceInfo, devices};
pub use ladder::ladder;
#[cfg(feature = "cuda")]
pub use module::{LAUNCHES, Program};
pub use needs::{LayerShapes, gathered_bytes, working_bytes};
#[cfg(feature = "cuda")]
pub use ops::embed::Embedding;
#[cfg(feature = "cuda")]
pub use ops::kda::Kda;
#[cfg(feature = "cuda")]
pub use ops::logits::Head;
#[cfg(feature = "cuda")]
pub use ops::mla::Mla;
#[cfg(feature = "cuda")]
pub use ops::mlp::Mlp;
#[cfg(feature = "cuda")]
pub use ops::moe::Moe;
#[cfg(feature = "cuda")]
pub use ops::norm::Norm;
#[cfg(feature = "cuda")]
pub use tensor::Tensor;
#[cfg(feature = "tuning")]
pub use tuning::{choose_variant, variants};

use perigee_backend::Result;

/// Fails with the reason why CUDA device `ordinal` cannot be used here: not built in, no driver, no such device, no
/// kernels for its architecture, or no cuBLAS.
///
/// # Errors
/// [`perigee_backend::BackendError::Unsupported`] where the program or the machine lacks something,
/// [`perigee_backend::BackendError::Device`] where the driver reports a fault.
pub fn check(ordinal: usize) -> Result<()> {
    #[cfg(feature = "cuda")]
    {
        device::check(ordinal)
    }
    #[cfg(not(feature = "cuda"))]
    {
        Err(perigee_backend::BackendError::Unsupported(format!(
            "device cuda:{ordinal}: this program was built without CUDA; build it with `--features cuda`"
        )))
    }
}

/// Memory in bytes of CUDA device `ordinal`, used or not.
///
/// # Errors
/// As [`check`].
pub fn memory(ordinal: usize) -> Result<u64> {
    check(ordinal)?;
    #[cfg(feature = "cuda")]
    {
        device::total_memory(ordinal)
    }
    // Without the feature the check never passes.
    #[cfg(not(feature = "cuda"))]
    {
        Ok(0)
    }
}

#[cfg(all(test, not(feature = "cuda")))]
mod tests {
    #[test]
    fn a_build_without_cuda_says_so() {
        let message = super::check(0).unwrap_err().to_string();
        assert!(message.contains("--features cuda"), "{message}");
    }
}
