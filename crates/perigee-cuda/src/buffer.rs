//! Memory with an owner: device memory, and page-locked host memory for copies that do not wait. A buffer knows its size, so
//! that every copy can be checked; what lies in it is the business of tensors, caches and weights.

use cudarc::driver::result;
use perigee_backend::{BackendError, Result};

use crate::device::{Device, fault};

/// An allocation on the device, freed when dropped.
#[derive(Debug)]
pub(crate) struct Buffer {
    address: u64,
    bytes: usize,
    device: Device,
}

impl Buffer {
    /// Allocates `bytes`, aligned to 256; the contents are undefined. `what` names the use in an out-of-memory error.
    pub(crate) fn new(device: &Device, bytes: usize, what: &str) -> Result<Self> {
        device.bind()?;
        // SAFETY: the context is current (bound above); a fresh allocation aliases nothing.
        let address = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|_| {
            let free = device.memory().map_or(0, |(free, _)| free);
            BackendError::Memory {
                what: what.into(),
                bytes: bytes as u64,
                hint: format!("; the device has {free} free"),
            }
        })?;
        Ok(Self { address, bytes, device: device.clone() })
    }

    /// Device address of the first byte.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// Size in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Address of a part, after checking that it lies inside.
    pub(crate) fn part(&self, offset: usize, bytes: usize) -> Result<u64> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.bytes => Ok(self.address + offset as u64),
            _ => Err(BackendError::Range {
                what: "device buffer byte",
                index: offset.saturating_add(bytes) as u64,
                limit: self.bytes as u64,
            }),
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: `address` came from the allocator in `new` and is freed once, here. The call waits for the device's
            // work, so no kernel still uses it. An error has nobody to go to: the context itself is broken then.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

/// Page-locked host memory, freed when dropped.
#[derive(Debug)]
pub(crate) struct Pinned {
    pointer: *mut u8,
    bytes: usize,
    device: Device,
}

impl Pinned {
    /// Allocates `bytes` of zeros.
    pub(crate) fn new(device: &Device, bytes: usize) -> Result<Self> {
        device.bind()?;
        // SAFETY: the context is current (bound above); the memory is owned by the value made here.
        let pointer =
            unsafe { result::malloc_host(bytes.max(1), 0) }.map_err(fault("allocating page-locked memory"))?;
        let pointer = pointer.cast::<u8>();
        // SAFETY: the allocation has at least `bytes` bytes and no other owner.
        unsafe { std::ptr::write_bytes(pointer, 0, bytes) };
        Ok(Self { pointer, bytes, device: device.clone() })
    }

    /// The bytes.
    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: `pointer` is valid for `bytes` initialised bytes (zeroed in `new`) until drop, and the borrow of self
        // keeps the mutable view away.
        unsafe { std::slice::from_raw_parts(self.pointer, self.bytes) }
    }

    /// The bytes, to be filled; the caller has waited for copies out of them.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and the mutable borrow of self is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.bytes) }
    }
}

// SAFETY: the memory is owned by this value alone and is plain bytes; page-locked memory may be used from any thread.
unsafe impl Send for Pinned {}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: `pointer` came from `malloc_host` and is freed once, here; its owners wait for their copies before
            // they drop or refill one.
            let _ = unsafe { result::free_host(self.pointer.cast()) };
        }
    }
}
