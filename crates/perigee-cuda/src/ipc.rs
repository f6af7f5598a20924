//! State slots of other processes on this machine, over CUDA's handles of device memory. What is told of slots says on which
//! machine and by which processes it can be opened at all, so that a handle is never tried where its numbers may mean
//! something else. Who opens slots copies out of them and writes nothing.

use std::collections::HashMap;
use std::ffi::c_char;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{result, sys};
use perigee_backend::{BackendError, Result};

use crate::buffer::Buffer;
use crate::device::{Device, fault};
use crate::stream::Stream;

/// Bytes of a handle, and of a name.
const HANDLE: usize = 64;
const NAME: usize = 64;
/// Allocations to be shared have a multiple of that many bytes: the driver may put smaller ones into one block, and a handle
/// stands for the block.
pub(crate) const SHARED_BLOCK: usize = 2 << 20;

/// Slots from which no session has come for that long are closed.
const IDLE: Duration = Duration::from_secs(60);
/// How often that, and whether a process still runs, is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// What another process must know.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
struct Shared {
    /// The machine since it was started, as the kernel names it.
    boot: [u8; NAME],
    /// The namespace of process ids, of which handles speak.
    processes: [u8; NAME],
    state: [u8; HANDLE],
    tails: [u8; HANDLE],
    /// Bytes of a slot in either.
    slot_state: u64,
    slot_tails: u64,
    slots: u64,
    /// Number of the process.
    process: u64,
}

/// Where a slot's parts lie, and how long they are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slots<'a> {
    pub(crate) state: &'a Buffer,
    pub(crate) tails: &'a Buffer,
    pub(crate) slot_state: usize,
    pub(crate) slot_tails: usize,
    pub(crate) slots: usize,
}

/// How the slots are reached; none where the machine or the driver shares nothing.
pub(crate) fn share(device: &Device, slots: &Slots<'_>) -> Result<Option<Vec<u8>>> {
    device.bind()?;
    let Some((boot, processes)) = machine() else { return Ok(None) };
    let (Some(state), Some(tails)) = (handle(slots.state), handle(slots.tails)) else { return Ok(None) };
    let [slot_state, slot_tails, slots] = [slots.slot_state, slots.slot_tails, slots.slots].map(|size| size as u64);
    let process = std::process::id().into();
    let shared = Shared { boot, processes, state, tails, slot_state, slot_tails, slots, process };
    Ok(Some(bytemuck::bytes_of(&shared).to_vec()))
}

/// This machine, and the namespace of this process; none where the system does not say.
fn machine() -> Option<([u8; NAME], [u8; NAME])> {
    let boot = std::fs::read("/proc/sys/kernel/random/boot_id").ok()?;
    let processes = std::fs::read_link("/proc/self/ns/pid").ok()?;
    Some((padded(boot.trim_ascii())?, padded(processes.to_str()?.as_bytes())?))
}

fn padded(text: &[u8]) -> Option<[u8; NAME]> {
    let mut name = [0; NAME];
    name.get_mut(..text.len())?.copy_from_slice(text);
    Some(name)
}

/// The handle of an allocation, with the device bound.
fn handle(buffer: &Buffer) -> Option<[u8; HANDLE]> {
    let mut handle = sys::CUipcMemHandle { reserved: [0; HANDLE] };
    // SAFETY: the address is that of a live allocation of this process, the out-pointer is valid for the call.
    let got = unsafe { sys::cuIpcGetMemHandle(&mut handle, buffer.address()) }.result();
    got.ok().map(|()| handle.reserved.map(|byte| byte as u8))
}

/// Slots of other processes that are open here. Opening takes as long as several steps, so slots stay open for the next session
/// from there; whoever they belong to is looked after by a thread, because its memory is not free before all have closed it.
#[derive(Debug, Default)]
pub(crate) struct Neighbours {
    open: Arc<Mutex<HashMap<Vec<u8>, Neighbour>>>,
}

/// One process's slots.
#[derive(Debug)]
struct Neighbour {
    shared: Shared,
    state: Mapped,
    tails: Mapped,
    /// How often it was opened and not closed.
    count: usize,
    /// When it was closed last.
    used: Instant,
}

impl Neighbour {
    /// Whether nobody needs it any more.
    fn is_over(&self) -> bool {
        let process = format!("/proc/{}", self.shared.process);
        self.count == 0 && (self.used.elapsed() > IDLE || !Path::new(&process).exists())
    }
}

impl Neighbours {
    fn lock(&self) -> MutexGuard<'_, HashMap<Vec<u8>, Neighbour>> {
        // Whole whatever a panic elsewhere left behind: entries are put in and taken out as such.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`perigee_backend::Backend::open_slots`].
    pub(crate) fn open(&mut self, device: &Device, shared: &[u8], own: &Slots<'_>) -> Result<()> {
        if let Some(neighbour) = self.lock().get_mut(shared) {
            neighbour.count += 1;
            return Ok(());
        }
        let unsupported = |what: &str| BackendError::Unsupported(format!("slots of {what}"));
        let read: Shared = bytemuck::try_pod_read_unaligned(shared).map_err(|_| unsupported("another version"))?;
        if machine() != Some((read.boot, read.processes)) {
            return Err(unsupported("another machine"));
        }
        if (read.slot_state, read.slot_tails) != (own.slot_state as u64, own.slot_tails as u64) {
            return Err(unsupported("another form"));
        }
        let (state, tails) = (Mapped::open(device, read.state)?, Mapped::open(device, read.tails)?);
        let neighbour = Neighbour { shared: read, state, tails, count: 1, used: Instant::now() };
        let is_first = {
            let mut open = self.lock();
            open.insert(shared.to_vec(), neighbour);
            open.len() == 1
        };
        if is_first {
            self.look_after()?;
        }
        Ok(())
    }

    /// Starts the thread that closes what nobody needs; it ends when nothing is open.
    fn look_after(&self) -> Result<()> {
        let open = Arc::downgrade(&self.open);
        let work = move || {
            loop {
                std::thread::sleep(LOOK);
                let Some(open) = Weak::upgrade(&open) else { return };
                let mut open = open.lock().unwrap_or_else(PoisonError::into_inner);
                let over: Vec<_> = open.extract_if(|_, neighbour| neighbour.is_over()).collect();
                let is_empty = open.is_empty();
                drop(open);
                // Closing takes a while; whoever opens others meanwhile must not wait.
                drop(over);
                if is_empty {
                    return;
                }
            }
        };
        let started = std::thread::Builder::new().name("perigee-neighbours".into()).spawn(work);
        started
            .map(drop)
            .map_err(|error| BackendError::Unsupported(format!("slots that nobody can look after: {error}")))
    }

    /// Queues the copy of a slot that is open to one of this process's.
    pub(crate) fn take(&self, stream: &Stream, shared: &[u8], from: u32, (own, to): (&Slots<'_>, usize)) -> Result<()> {
        let open = self.lock();
        let missing = || BackendError::Unsupported("slots that are not open".into());
        let neighbour = open.get(shared).ok_or_else(missing)?;
        if u64::from(from) >= neighbour.shared.slots {
            let limit = neighbour.shared.slots;
            return Err(BackendError::Range { what: "state slot of another process", index: from.into(), limit });
        }
        let from = from as usize;
        neighbour.state.copy(stream, from * own.slot_state, (own.state, to * own.slot_state), own.slot_state)?;
        neighbour.tails.copy(stream, from * own.slot_tails, (own.tails, to * own.slot_tails), own.slot_tails)
    }

    /// See [`perigee_backend::Backend::close_slots`].
    pub(crate) fn close(&mut self, shared: &[u8]) {
        if let Some(neighbour) = self.lock().get_mut(shared) {
            neighbour.count = neighbour.count.saturating_sub(1);
            neighbour.used = Instant::now();
        }
    }
}

/// Memory of another process in this one's address space, until it is dropped.
#[derive(Debug)]
struct Mapped {
    address: u64,
    device: Device,
}

impl Mapped {
    fn open(device: &Device, handle: [u8; HANDLE]) -> Result<Self> {
        device.bind()?;
        let handle = sys::CUipcMemHandle { reserved: handle.map(|byte| byte as c_char) };
        let flags = sys::CUipcMem_flags_enum::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut address = 0;
        // SAFETY: the context is current (bound above), the out-pointer is valid for the call, and the driver checks the handle.
        unsafe { sys::cuIpcOpenMemHandle_v2(&mut address, handle, flags) }.result().map_err(|error| {
            BackendError::Unsupported(format!("slots of a process that cannot be reached: {error:?}"))
        })?;
        Ok(Self { address, device: device.clone() })
    }

    fn copy(&self, stream: &Stream, offset: usize, (to, at): (&Buffer, usize), bytes: usize) -> Result<()> {
        let target = to.part(at, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: the target range lies inside a live allocation. The source range lies inside what the other process has told
        // of its slots (checked by `take`), mapped until `self` is dropped; where that process has lied or is gone, the driver
        // fails the copy or the digests over what was written do not agree.
        unsafe { result::memcpy_dtod_async(target, self.address + offset as u64, bytes, stream.raw()) }
            .map_err(fault("copying a slot of another process"))
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: opened by `open` and closed once; whoever queued copies out of it has waited for them.
            let _ = unsafe { sys::cuIpcCloseMemHandle(self.address) }.result();
        }
    }
}
