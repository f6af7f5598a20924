//! A communicator behind a lock that is held for one call at a time, so that the watch can abort it between two calls and
//! nobody uses it afterwards. Calls are queued, never waited for while the lock is held.

use std::ffi::c_int;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use perigee_backend::{BackendError, DType, Result};

use super::library::{self, Config, IN_PROGRESS, Library, RawCommunicator, SUCCESS, UniqueId};
use crate::stream::Stream;

/// How often an unfinished call is asked for.
const POLL: Duration = Duration::from_micros(50);
/// How long the other ranks may take to leave in order.
const LEAVING: Duration = Duration::from_secs(2);

#[derive(Debug)]
struct Handle(RawCommunicator);

// SAFETY: the library lets any thread use a communicator as long as calls do not overlap, which the lock around the handle
// ensures.
unsafe impl Send for Handle {}

/// One rank's end of a communicator.
#[derive(Debug)]
pub(super) struct Communicator {
    library: &'static Library,
    /// None once it was aborted or destroyed.
    handle: Mutex<Option<Handle>>,
    /// Why it was aborted.
    failure: OnceLock<String>,
}

impl Communicator {
    /// Meets the other ranks; the device is the thread's current one.
    pub(super) fn form(
        library: &'static Library,
        id: [u8; library::ID_BYTES],
        (rank, size): (usize, usize),
        deadline: Instant,
    ) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        let mut config = Config::non_blocking();
        // SAFETY: both pointers are valid for the call; the library copies the configuration.
        let code =
            unsafe { (library.init)(&mut raw, size as c_int, UniqueId { bytes: id }, rank as c_int, &mut config) };
        let formed = Self { library, handle: Mutex::new(Some(Handle(raw))), failure: OnceLock::new() };
        if let Err(error) = formed.settle("forming the group", code, Some(deadline)) {
            formed.abort(&error.to_string());
            return Err(error);
        }
        Ok(formed)
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
            // like every other work on it; the communicator is alive while the lock is held.
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

    /// Ends all queued work on this rank and the communicator with it. Later calls fail with this reason.
    pub(super) fn abort(&self, reason: &str) {
        // Before the kernels end: who waited for them asks for it.
        let _ = self.failure.set(reason.to_owned());
        if let Some(handle) = self.lock().take() {
            // SAFETY: the handle was taken out, so nobody uses it any more; aborting frees it.
            let _ = unsafe { (self.library.abort)(handle.0) };
        }
    }

    /// A fault that the library found by itself, such as a broken connection.
    pub(super) fn fault(&self) -> Option<String> {
        let (code, _) = self.progress()?;
        if code == SUCCESS || code == IN_PROGRESS {
            return None;
        }
        self.library.expect("exchanging with other ranks", code).err().map(|error| error.to_string())
    }

    /// Leaves in order where the other ranks do too, else at once.
    pub(super) fn close(&self) {
        let code = {
            let handle = self.lock();
            let Some(handle) = handle.as_ref() else { return };
            // SAFETY: the communicator is alive while the lock is held.
            unsafe { (self.library.finalize)(handle.0) }
        };
        let left = self.settle("leaving the group", code, Some(Instant::now() + LEAVING));
        let Some(handle) = self.lock().take() else { return };
        let end = if left.is_ok() { self.library.destroy } else { self.library.abort };
        // SAFETY: the handle was taken out, so nobody uses it any more. Destroying follows a finished `finalize`; aborting ends
        // whatever is under way.
        let _ = unsafe { end(handle.0) };
    }

    fn call(&self, what: &str, queue: impl FnOnce(&Library, RawCommunicator) -> c_int) -> Result<()> {
        let code = {
            let handle = self.lock();
            let Some(handle) = handle.as_ref() else { return self.gone() };
            queue(self.library, handle.0)
        };
        self.settle(what, code, None)
    }

    /// Waits until a call that is under way is queued, or done, as the library has it.
    fn settle(&self, what: &str, mut code: c_int, deadline: Option<Instant>) -> Result<()> {
        while code == IN_PROGRESS {
            if deadline.is_some_and(|deadline| Instant::now() > deadline) {
                return Err(BackendError::Collective(format!("NCCL, {what}: not all ranks came in time")));
            }
            let Some((now, asked)) = self.progress() else { return self.gone() };
            self.library.expect(what, asked)?;
            code = now;
            if code == IN_PROGRESS {
                std::thread::sleep(POLL);
            }
        }
        self.library.expect(what, code)
    }

    /// The state of the call under way, and whether asking went well.
    fn progress(&self) -> Option<(c_int, c_int)> {
        let handle = self.lock();
        let raw = handle.as_ref()?.0;
        let mut code = SUCCESS;
        // SAFETY: the communicator is alive while the lock is held; the pointer is valid for the call.
        let asked = unsafe { (self.library.async_error)(raw, &mut code) };
        Some((code, asked))
    }

    fn gone(&self) -> Result<()> {
        self.check()?;
        Err(BackendError::Collective("the group of ranks has been left".into()))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Handle>> {
        // Nothing that holds the lock panics; if something did, the handle is still either there or taken.
        self.handle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
