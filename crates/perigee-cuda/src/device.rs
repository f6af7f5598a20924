//! The GPU as the driver shows it: which there are, whether one can be used, and the context that keeps it open. It
//! allocates nothing and launches nothing.

use std::sync::Arc;

use cudarc::driver::sys::CUdevice_attribute_enum as Attribute;
use cudarc::driver::{CudaContext, DriverError, result};
use perigee_backend::{BackendError, Result};

/// A driver error with what was being done.
pub(crate) fn fault(what: &str) -> impl FnOnce(DriverError) -> BackendError + '_ {
    move |error| BackendError::Device(format!("{what}: {error:?}"))
}

/// What a GPU is, for logs and for choosing one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Name as the driver gives it.
    pub name: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Memory in bytes.
    pub memory: u64,
}

/// An open GPU. Clones share the context; it is released with the last one.
#[derive(Debug, Clone)]
pub(crate) struct Device {
    context: Arc<CudaContext>,
    multiprocessors: u32,
}

impl Device {
    /// Opens a GPU after [`check`].
    pub(crate) fn open(ordinal: usize) -> Result<Self> {
        check(ordinal)?;
        let context = CudaContext::new(ordinal).map_err(fault("opening the device"))?;
        let multiprocessors = attribute(&context, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        Ok(Self { context, multiprocessors })
    }

    /// Makes this device the calling thread's.
    pub(crate) fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(fault("binding the device to the thread"))
    }

    /// Compute capability.
    pub(crate) fn capability(&self) -> Result<(u32, u32)> {
        let major = attribute(&self.context, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(&self.context, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        Ok((major, minor))
    }

    /// A number that no other GPU has.
    pub(crate) fn uuid(&self) -> Result<[u8; 16]> {
        let uuid = self.context.uuid().map_err(fault("asking for the device's number"))?;
        Ok(uuid.bytes.map(|byte| byte as u8))
    }

    /// Number of multiprocessors.
    pub(crate) fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// Free and total memory in bytes.
    pub(crate) fn memory(&self) -> Result<(usize, usize)> {
        self.bind()?;
        result::mem_get_info().map_err(fault("asking for free memory"))
    }

    /// Name, capability and sizes.
    pub(crate) fn info(&self) -> Result<DeviceInfo> {
        Ok(DeviceInfo {
            name: self.context.name().map_err(fault("asking for the device's name"))?,
            capability: self.capability()?,
            multiprocessors: self.multiprocessors,
            memory: self.memory()?.1 as u64,
        })
    }
}

fn attribute(context: &CudaContext, which: Attribute) -> Result<u32> {
    context.attribute(which).map(i32::unsigned_abs).map_err(fault("asking for a device attribute"))
}

/// The GPUs of this machine, none where there is no driver.
///
/// # Errors
/// [`BackendError::Device`] where the driver is there but fails.
pub fn devices() -> Result<Vec<DeviceInfo>> {
    if !driver_is_present() {
        return Ok(Vec::new());
    }
    (0..count()?).map(|ordinal| Device::open(ordinal)?.info()).collect()
}

fn driver_is_present() -> bool {
    // SAFETY: the call only tries to load the driver library by name; it takes no arguments and hands out nothing.
    unsafe { cudarc::driver::sys::is_culib_present() }
}

fn count() -> Result<usize> {
    result::init().map_err(|error| BackendError::Unsupported(format!("CUDA driver does not start: {error:?}")))?;
    let count = result::device::get_count().map_err(fault("counting devices"))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// See [`crate::memory`].
pub(crate) fn total_memory(ordinal: usize) -> Result<u64> {
    let device =
        result::device::get(i32::try_from(ordinal).unwrap_or(i32::MAX)).map_err(fault("finding the device"))?;
    // SAFETY: the driver just handed this device out.
    let total = unsafe { result::device::total_mem(device) }.map_err(fault("asking for the device's memory"))?;
    Ok(total as u64)
}

/// See [`crate::check`].
pub(crate) fn check(ordinal: usize) -> Result<()> {
    let unsupported = |reason: String| Err(BackendError::Unsupported(format!("device cuda:{ordinal}: {reason}")));
    if !driver_is_present() {
        return unsupported(
            "the NVIDIA driver library libcuda.so.1 cannot be loaded; is there a GPU, and is its driver installed?"
                .into(),
        );
    }
    let count = count()?;
    if ordinal >= count {
        return unsupported(format!("this machine has {count} CUDA devices"));
    }
    // SAFETY: as above, for the library of dense products.
    if !unsafe { cudarc::cublaslt::sys::is_culib_present() } {
        return unsupported(
            "libcublasLt.so.13 cannot be loaded; install CUDA 13's cuBLAS or set LD_LIBRARY_PATH".into(),
        );
    }
    let context = CudaContext::new(ordinal).map_err(fault("opening the device"))?;
    let major = attribute(&context, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(&context, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    if perigee_kernels::images().iter().any(|image| perigee_kernels::runs_on(image.architecture, major, minor)) {
        return Ok(());
    }
    unsupported(format!(
        "no kernels for compute capability {major}.{minor} in this program; build with PERIGEE_CUDA_ARCHS={major}{minor}"
    ))
}
