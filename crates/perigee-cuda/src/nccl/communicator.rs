//! A communicator that one thread uses and another may abort. Its calls block only until their work is queued (non-blocking
//! communicators start a thread for each call, which is slow and cannot be captured in a graph), so a lock is held for each
//! call, and the watch gets between two of them.

use std::ffi::c_int;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use perigee_backend::{BackendError, DType, Result};

use super::library::{self, Library, RawCommunicator, SUCCESS, UniqueId};
use super::watch::Watched;
use crate::device::Device;
use crate::stream::Stream;

/// How long an abort waits for the end of a call before it goes ahead: first calls connect to the other ranks, and hang
/// when one is gone.
const CALL: Duration = Duration::from_millis(500);

/// One rank's end of a communicator.
#[derive(Debug)]
pub(super) struct Communicator {
    library: &'static Library,
    /// Null once it was aborted or destroyed.
    raw: AtomicPtr<std::ffi::c_void>,
    /// Held during every call.
    in_use: Mutex<()>,
    /// Why it was aborted.
    failure: OnceLock<String>,
}

/// A communicator on its way out of the thread that formed it.
struct Formed(RawCommunicator);

// SAFETY: the library lets any thread use a communicator, one at a time.
unsafe impl Send for Formed {}

impl Communicator {
    /// Meets the other ranks, in a thread of its own: meeting a rank that is gone could take for ever.
    pub(super) fn form(
        library: &'static Library,
        device: &Device,
        id: [u8; library::ID_BYTES],
        (rank, size): (usize, usize),
        patience: Duration,
    ) -> Result<Self> {
        let failed = |message: String| BackendError::Collective(format!("NCCL, forming the group: {message}"));
        let (sender, formed) = channel();
        let device = device.clone();
        let form = move || {
            let met = device.bind().and_then(|()| {
                let mut raw = null_mut();
                // SAFETY: the pointer is valid for the call, and the device is the thread's current one.
                let code = unsafe { (library.init)(&mut raw, size as c_int, UniqueId { bytes: id }, rank as c_int) };
                library.expect("forming the group", code).map(|()| Formed(raw))
            });
            // Nobody listens where the patience was too short; the process is about to end then.
            let _ = sender.send(met);
        };
        std::thread::Builder::new()
            .name("perigee-nccl-form".into())
            .spawn(form)
            .map_err(|error| failed(error.to_string()))?;
        let Formed(raw) =
            formed.recv_timeout(patience).map_err(|_| failed(format!("not all ranks came within {patience:?}")))??;
        Ok(Self { library, raw: AtomicPtr::new(raw), in_use: Mutex::new(()), failure: OnceLock::new() })
    }

    pub(super) fn check(&self) -> Result<()> {
        match self.failure.get() {
            Some(reason) => Err(BackendError::Collective(reason.clone())),
            None => Ok(()),
        }
    }

    pub(super) fn all_reduce(&self, stream: &Stream, address: u64, count: usize, dtype: DType) -> Result<()> {
        let dtype = match dtype {
            DType::Bf16 => library::BFLOAT16,
            DType::Fp32 => library::FLOAT32,
        };
        self.call("queueing a sum", |library, raw| {
            let data = address as *mut _;
            // SAFETY: `address` is device memory with room for `count` elements (checked by the op), used in stream order
            // like every other work on it; the communicator is alive during a call (see `abort`).
            unsafe { (library.all_reduce)(data, data, count, dtype, library::SUM, raw, stream.raw().cast()) }
        })
    }

    /// Gathers `count` float32 numbers from each rank: rank r's come to lie at `address` + r * count; this rank's are there.
    pub(super) fn all_gather(&self, stream: &Stream, rank: usize, address: u64, count: usize) -> Result<()> {
        self.call("queueing a gather", |library, raw| {
            let mine = address + (rank * count * 4) as u64;
            // SAFETY: as above, for `count` numbers of every rank (sized by `gather_place`); a rank's own part lies where the
            // library would put it, which it allows.
            unsafe {
                let (from, to) = (mine as *const _, address as *mut _);
                (library.all_gather)(from, to, count, library::FLOAT32, raw, stream.raw().cast())
            }
        })
    }

    /// Copies `count` 32-bit integers at `address` from rank 0 to all.
    pub(super) fn broadcast(&self, stream: &Stream, address: u64, count: usize) -> Result<()> {
        self.call("queueing a broadcast", |library, raw| {
            let data = address as *mut _;
            // SAFETY: as above, for `count` integers (a section of the step's plan, checked by the step).
            unsafe { (library.broadcast)(data, data, count, library::UINT32, 0, raw, stream.raw().cast()) }
        })
    }

    /// Leaves, when all work of all ranks is done.
    pub(super) fn close(&self) {
        let _call = self.begin_call();
        let raw = self.raw.swap(null_mut(), Ordering::AcqRel);
        if !raw.is_null() {
            // SAFETY: the pointer was taken out, so nobody uses the communicator any more.
            let _ = unsafe { (self.library.destroy)(raw) };
        }
    }

    fn call(&self, what: &str, queue: impl FnOnce(&Library, RawCommunicator) -> c_int) -> Result<()> {
        let _call = self.begin_call();
        let raw = self.raw.load(Ordering::Acquire);
        if raw.is_null() {
            self.check()?;
            return Err(BackendError::Collective("the group of ranks has been left".into()));
        }
        let code = queue(self.library, raw);
        // A call that was aborted reports that; the reason says more.
        self.check()?;
        self.library.expect(what, code)
    }

    fn begin_call(&self) -> MutexGuard<'_, ()> {
        self.in_use.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lock, unless a call takes longer than the abort waits.
    fn between_calls(&self) -> Option<MutexGuard<'_, ()>> {
        let deadline = Instant::now() + CALL;
        loop {
            match self.in_use.try_lock() {
                Ok(guard) => return Some(guard),
                Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) if Instant::now() > deadline => return None,
                Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

impl Watched for Communicator {
    /// A fault that the library found by itself, such as a broken connection.
    fn fault(&self) -> Option<String> {
        let _call = self.in_use.try_lock().ok()?;
        let raw = self.raw.load(Ordering::Acquire);
        if raw.is_null() {
            return None;
        }
        let mut code = SUCCESS;
        // SAFETY: the communicator is alive while the lock is held; the pointer is valid for the call.
        let asked = unsafe { (self.library.async_error)(raw, &mut code) };
        let found = self.library.expect("watching the group", asked);
        found
            .and_then(|()| self.library.expect("exchanging with other ranks", code))
            .err()
            .map(|error| error.to_string())
    }

    /// Ends all queued work on this rank and the communicator with it. Later calls fail with this reason.
    fn abort(&self, reason: &str) {
        // Before the kernels end: who waited for them asks for it.
        let _ = self.failure.set(reason.to_owned());
        let call = self.between_calls();
        let raw = self.raw.swap(null_mut(), Ordering::AcqRel);
        // The abort returns once no graph holds calls of this communicator any more. Their owner, who finds nothing to call
        // from now on, must not wait for the abort before it drops them.
        drop(call);
        if !raw.is_null() {
            // SAFETY: the pointer was taken out, so no call begins any more. None is under way, or one hangs, which the
            // library allows to end like this, from another thread.
            let _ = unsafe { (self.library.abort)(raw) };
        }
    }
}
