//! Compiled kernels on the device: images become modules, and a kernel is a function together with the type of its one
//! argument. The size of that argument is compared with what the image says, so the two sides cannot drift apart unseen.

use std::collections::HashMap;
use std::ffi::CString;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytemuck::Pod;
use cudarc::driver::{result, sys};
use perigee_backend::{BackendError, Result};

use crate::device::{Device, fault};

/// Target of the events, at the level DEBUG, that name in `kernel` each kernel that a backend queues or records for the first time.
pub const LAUNCHES: &str = "perigee_cuda::launches";

/// This program's kernels on a device, loaded once for any number of backends there.
#[derive(Debug, Clone)]
pub struct Program {
    pub(crate) modules: Arc<Modules>,
}

impl Program {
    /// Loads them onto a device.
    ///
    /// # Errors
    /// As [`crate::check`], or [`BackendError::Device`] where the driver refuses an image.
    pub fn load(device: usize) -> Result<Self> {
        Ok(Self { modules: Arc::new(Modules::load(&Device::open(device)?)?) })
    }
}

/// All modules that run on a device.
#[derive(Debug)]
pub(crate) struct Modules {
    modules: HashMap<&'static str, sys::CUmodule>,
    device: Device,
}

impl Modules {
    /// The device that they are on.
    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// Loads every image that fits the device, the most specific one of each module.
    pub(crate) fn load(device: &Device) -> Result<Self> {
        device.bind()?;
        let (major, minor) = device.capability()?;
        let mut modules = Self { modules: HashMap::new(), device: device.clone() };
        let mut images: Vec<_> = perigee_kernels::images()
            .iter()
            .filter(|image| perigee_kernels::runs_on(image.architecture, major, minor))
            .collect();
        images.sort_by_key(|image| std::cmp::Reverse(image.architecture));
        for image in images {
            if modules.modules.contains_key(image.module) {
                continue;
            }
            let code = image.unpack().map_err(|damaged| BackendError::Device(damaged.to_string()))?;
            // SAFETY: the context is current; the code is a complete cubin, which the driver copies before it returns.
            let module = unsafe { result::module::load_data(code.as_ptr().cast()) }
                .map_err(fault(&format!("loading the kernels of {}", image.module)))?;
            modules.modules.insert(image.module, module);
        }
        Ok(modules)
    }

    /// A kernel by module and name that waits by `grid_wait` of common.cuh: on devices that can, it may begin before
    /// the kernel ahead of it in a stream has ended.
    pub(crate) fn overlapping<P: Pod>(&self, module: &str, name: &str) -> Result<Kernel<P>> {
        let begins_ahead = self.device.capability()?.0 >= 9;
        Ok(Kernel { begins_ahead, ..self.kernel(module, name)? })
    }

    /// The same, launched with up to `shared` bytes of dynamic shared memory a block.
    pub(crate) fn overlapping_with<P: Pod>(&self, module: &str, name: &str, shared: usize) -> Result<Kernel<P>> {
        let kernel = self.overlapping(module, name)?;
        kernel.allow_shared(shared)?;
        Ok(kernel)
    }

    /// A kernel by module and name; `P` is its argument.
    pub(crate) fn kernel<P: Pod>(&self, module: &str, name: &str) -> Result<Kernel<P>> {
        let missing = || BackendError::Device(format!("kernel {name} of module {module} is not in this program"));
        let handle = *self.modules.get(module).ok_or_else(missing)?;
        let symbol = CString::new(name).map_err(|_| missing())?;
        self.device.bind()?;
        // SAFETY: the module is loaded and stays so as long as `self`, which outlives every kernel (see `Kernels`).
        let function = unsafe { result::module::get_function(handle, symbol) }.map_err(|_| missing())?;
        let (mut offset, mut size) = (0, 0);
        // SAFETY: `function` was just obtained; the two out-pointers are valid for the call.
        unsafe { sys::cuFuncGetParamInfo(function, 0, &mut offset, &mut size) }
            .result()
            .map_err(fault(&format!("asking for the arguments of {name}")))?;
        // Where the argument begins depends on its alignment, which the driver sees to.
        if size != size_of::<P>() {
            return Err(BackendError::Device(format!(
                "kernel {name} takes {size} bytes of arguments, its launcher passes {}",
                size_of::<P>()
            )));
        }
        Ok(Kernel {
            function,
            name: name.into(),
            begins_ahead: false,
            was_launched: Arc::default(),
            argument: PhantomData,
        })
    }
}

// SAFETY: module handles belong to the context, not to a thread; calls that use them bind the context first.
unsafe impl Send for Modules {}
// SAFETY: the map is not changed after `load`, and the driver takes calls from several threads.
unsafe impl Sync for Modules {}

impl Drop for Modules {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            for module in self.modules.values() {
                // SAFETY: each module was loaded once and is unloaded once; kernels are dropped with the backend that
                // owns both, and unloading waits for running work.
                let _ = unsafe { result::module::unload(*module) };
            }
        }
    }
}

/// A kernel whose single argument is a `P`.
#[derive(Debug, Clone)]
pub(crate) struct Kernel<P> {
    function: sys::CUfunction,
    name: String,
    begins_ahead: bool,
    was_launched: Arc<AtomicBool>,
    argument: PhantomData<fn(P)>,
}

// SAFETY: function handles belong to the context, not to a thread; launches bind the context first.
unsafe impl<P> Send for Kernel<P> {}
// SAFETY: a kernel is not changed once made, and the driver takes launches from several threads.
unsafe impl<P> Sync for Kernel<P> {}

impl<P: Pod> Kernel<P> {
    /// Whether it may begin before the kernel ahead of it in a stream has ended.
    pub(crate) fn may_begin_ahead(&self) -> bool {
        self.begins_ahead
    }

    /// Lets blocks use up to `bytes` of dynamic shared memory.
    pub(crate) fn allow_shared(&self, bytes: usize) -> Result<()> {
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let value = i32::try_from(bytes).unwrap_or(i32::MAX);
        // SAFETY: the function belongs to a loaded module.
        unsafe { result::function::set_function_attribute(self.function, attribute, value) }
            .map_err(fault(&format!("raising the shared memory of {}", self.name)))
    }

    /// Tells the first launch, so that what ran can be held against what was checked.
    pub(crate) fn note_launch(&self) {
        if !self.was_launched.load(Ordering::Relaxed) && !self.was_launched.swap(true, Ordering::Relaxed) {
            tracing::debug!(target: LAUNCHES, kernel = self.name, "first launch");
        }
    }

    pub(crate) fn function(&self) -> sys::CUfunction {
        self.function
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}
