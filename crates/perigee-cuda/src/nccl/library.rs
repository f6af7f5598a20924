//! The functions of NCCL that are used, found in libnccl.so.2 at run time. Its absence is no error here. The bindings of cudarc
//! look for it under other names than the one it is installed by, and end the program where a function is missing.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use perigee_backend::{BackendError, Result};

use super::pair::Config;

/// Bytes of a unique id.
pub(super) const ID_BYTES: usize = 128;

pub(super) const SUCCESS: c_int = 0;
/// A call of a communicator that returns at once is not taken in yet.
pub(super) const IN_PROGRESS: c_int = 7;
pub(super) const INT8: c_int = 0;
pub(super) const UINT32: c_int = 3;
pub(super) const FLOAT32: c_int = 7;
pub(super) const BFLOAT16: c_int = 9;
pub(super) const SUM: c_int = 0;

/// A communicator as the library hands it out.
pub(super) type RawCommunicator = *mut c_void;

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct UniqueId {
    pub(super) bytes: [u8; ID_BYTES],
}

type OfCommunicator = unsafe extern "C" fn(RawCommunicator) -> c_int;
type AllReduce =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, RawCommunicator, *mut c_void) -> c_int;
type Broadcast =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, RawCommunicator, *mut c_void) -> c_int;
type AllGather = unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, RawCommunicator, *mut c_void) -> c_int;

type InitConfig = unsafe extern "C" fn(*mut RawCommunicator, c_int, UniqueId, c_int, *mut Config) -> c_int;
type Send = unsafe extern "C" fn(*const c_void, usize, c_int, c_int, RawCommunicator, *mut c_void) -> c_int;
type Receive = unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, RawCommunicator, *mut c_void) -> c_int;

/// The loaded library.
#[derive(Debug)]
pub(crate) struct Library {
    version: c_int,
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    pub(super) init: unsafe extern "C" fn(*mut RawCommunicator, c_int, UniqueId, c_int) -> c_int,
    pub(super) init_config: InitConfig,
    pub(super) destroy: OfCommunicator,
    pub(super) abort: OfCommunicator,
    pub(super) async_error: unsafe extern "C" fn(RawCommunicator, *mut c_int) -> c_int,
    pub(super) all_reduce: AllReduce,
    pub(super) all_gather: AllGather,
    pub(super) broadcast: Broadcast,
    pub(super) send: Send,
    pub(super) receive: Receive,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    last_error: unsafe extern "C" fn(RawCommunicator) -> *const c_char,
    /// Keeps the functions where they are.
    _library: libloading::Library,
}

impl Library {
    /// The library of this process, or why there is none.
    pub(crate) fn get() -> std::result::Result<&'static Self, &'static str> {
        static LIBRARY: OnceLock<std::result::Result<Library, String>> = OnceLock::new();
        LIBRARY.get_or_init(Self::load).as_ref().map_err(String::as_str)
    }

    fn load() -> std::result::Result<Self, String> {
        // SAFETY: loading runs the library's initialisers, which have no conditions.
        let library = unsafe { libloading::Library::new("libnccl.so.2") }.map_err(|error| error.to_string())?;
        /// A function by name.
        ///
        /// # Safety
        /// `F` is the function's type in nccl.h.
        unsafe fn find<F: Copy>(library: &libloading::Library, name: &str) -> std::result::Result<F, String> {
            // SAFETY: the caller's promise.
            unsafe { library.get::<F>(name.as_bytes()) }.map(|symbol| *symbol).map_err(|error| error.to_string())
        }
        // SAFETY: each type is that of nccl.h, with enumerations as the integers that they are in C.
        let mut loaded = unsafe {
            Self {
                version: 0,
                get_unique_id: find(&library, "ncclGetUniqueId")?,
                init: find(&library, "ncclCommInitRank")?,
                init_config: find(&library, "ncclCommInitRankConfig")?,
                destroy: find(&library, "ncclCommDestroy")?,
                abort: find(&library, "ncclCommAbort")?,
                async_error: find(&library, "ncclCommGetAsyncError")?,
                all_reduce: find(&library, "ncclAllReduce")?,
                all_gather: find(&library, "ncclAllGather")?,
                broadcast: find(&library, "ncclBroadcast")?,
                send: find(&library, "ncclSend")?,
                receive: find(&library, "ncclRecv")?,
                error_string: find(&library, "ncclGetErrorString")?,
                last_error: find(&library, "ncclGetLastError")?,
                _library: library,
            }
        };
        // SAFETY: as above; the pointer is valid for the call.
        let code = unsafe {
            let version: unsafe extern "C" fn(*mut c_int) -> c_int = find(&loaded._library, "ncclGetVersion")?;
            version(&mut loaded.version)
        };
        if code == SUCCESS { Ok(loaded) } else { Err(format!("its version is unknown: error {code}")) }
    }

    /// The version as the library counts: 23102 for 2.31.2.
    pub(crate) fn version(&self) -> i32 {
        self.version
    }

    /// A fresh id for one communicator.
    pub(super) fn unique_id(&self) -> Result<[u8; ID_BYTES]> {
        let mut id = UniqueId { bytes: [0; ID_BYTES] };
        // SAFETY: the pointer is valid for the call.
        let code = unsafe { (self.get_unique_id)(&mut id) };
        self.expect("making an id", code).map(|()| id.bytes)
    }

    /// Fails unless the code is success, in the library's words.
    pub(super) fn expect(&self, what: &str, code: c_int) -> Result<()> {
        if code == SUCCESS {
            return Ok(());
        }
        // SAFETY: both functions return strings that live as long as the library; a null communicator is allowed.
        let (name, detail) =
            unsafe { (text((self.error_string)(code)), text((self.last_error)(std::ptr::null_mut()))) };
        let detail = if detail.is_empty() { detail } else { format!(": {}", detail.trim()) };
        Err(BackendError::Collective(format!("NCCL, {what}: {name}{detail}")))
    }
}

/// A string of the library, empty for null.
///
/// # Safety
/// The pointer is null or a string that nobody changes meanwhile.
unsafe fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}
