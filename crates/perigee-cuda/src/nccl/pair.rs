//! Pairs by NCCL: a communicator of two, on a stream of its own, which its thread makes, uses and aborts. It is of the kind whose
//! calls return at once, so nothing that this thread does can hang: what a lost or silent end would leave waiting, on the host or
//! on the device, is aborted with the communicator, and no other communicator is touched. It has few blocks on the device, beside
//! which steps go on.

use std::ffi::{c_char, c_int};
use std::ptr::null_mut;
use std::sync::Arc;
use std::time::Duration;

use perigee_backend::pairs::{PairEnd, PairLink, PairTransport, Watch};
use perigee_backend::{BackendError, Result};

use super::library::{self, ID_BYTES, IN_PROGRESS, Library, RawCommunicator, SUCCESS, UniqueId};
use crate::buffer::Buffer;
use crate::device::Device;
use crate::exchange::{SHARED_CARDS, UUID_BYTES, allows_shared_cards};
use crate::stream::{Event, Stream};

/// How often the thread looks whether the device has done something.
const LOOK: Duration = Duration::from_micros(100);
/// How often while the ends meet, which takes long.
const LOOK_MEETING: Duration = Duration::from_millis(2);
/// Blocks of one transfer on the device: over NVLink they carry a state of 44 MB in about a millisecond.
const BLOCKS: c_int = 4;
/// Bytes that go first, so that the ends connect before a session waits for that.
const GREETING: usize = 256;

/// Communicators of two between this device and those of other processes.
#[derive(Debug)]
pub(crate) struct NcclPairs {
    library: &'static Library,
    device: Device,
}

/// A piece of device memory that is sent, or filled. It lives as long as anything may be queued that uses it.
#[derive(Debug, Clone)]
pub(crate) struct Piece {
    pub(crate) buffer: Arc<Buffer>,
    pub(crate) offset: usize,
    pub(crate) bytes: usize,
}

/// A slot on its way: its pieces, in the same sizes and order at both ends.
pub(crate) type Parcel = Vec<Piece>;

/// `ncclConfig_t` as of 2.18, which later versions read by its size and version.
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cluster_size: c_int,
    least_blocks: c_int,
    most_blocks: c_int,
    network: *const c_char,
    split_share: c_int,
    /// Later versions have a field here.
    unused: c_int,
}

/// A field that keeps its default.
const UNDEFINED: c_int = c_int::MIN;

impl Config {
    /// Calls return at once; a transfer has few blocks.
    fn for_pairs() -> Self {
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: 21_800,
            blocking: 0,
            cluster_size: UNDEFINED,
            least_blocks: 1,
            most_blocks: BLOCKS,
            network: std::ptr::null(),
            split_share: UNDEFINED,
            unused: UNDEFINED,
        }
    }
}

impl NcclPairs {
    pub(crate) fn new(library: &'static Library, device: &Device) -> Self {
        Self { library, device: device.clone() }
    }

    /// Why a target cannot meet whoever made this invitation, if it cannot.
    pub(crate) fn refusal(&self, invitation: &[u8]) -> Option<String> {
        let Some((_, card)) = invitation.split_at_checked(ID_BYTES).filter(|(_, card)| card.len() == UUID_BYTES) else {
            return Some("an invitation of another version".into());
        };
        match self.device.uuid() {
            Err(error) => Some(error.to_string()),
            Ok(own) if own == card && !allows_shared_cards() => {
                Some(format!("both ends have the same card, and {SHARED_CARDS} is not 1"))
            }
            Ok(_) => None,
        }
    }
}

impl PairTransport for NcclPairs {
    type Parcel = Parcel;
    type Link = NcclPair;

    fn invite(&self) -> std::result::Result<Vec<u8>, String> {
        let id = self.library.unique_id().map_err(told)?;
        Ok([id.as_slice(), &self.device.uuid().map_err(told)?].concat())
    }

    fn meet(&self, invitation: &[u8], end: PairEnd, watch: &Watch) -> std::result::Result<NcclPair, String> {
        let (id, _) = invitation.split_first_chunk::<ID_BYTES>().ok_or("an invitation of another version")?;
        let rank = c_int::from(end == PairEnd::Target);
        self.device.bind().map_err(told)?;
        let mut pair = NcclPair {
            library: self.library,
            raw: null_mut(),
            other: 1 - rank,
            done: Event::new(&self.device, false).map_err(told)?,
            stream: Stream::new(&self.device).map_err(told)?,
            greeting: Arc::new(Buffer::new(&self.device, GREETING, "the greeting of a pair").map_err(told)?),
        };
        let mut config = Config::for_pairs();
        // SAFETY: the pointers are valid for the call, which copies what it keeps, and the device is the thread's current one.
        let code = unsafe { (self.library.init_config)(&mut pair.raw, 2, UniqueId { bytes: *id }, rank, &mut config) };
        pair.settle("meeting", code, (watch, LOOK_MEETING))?;
        let piece = Piece { buffer: Arc::clone(&pair.greeting), offset: 0, bytes: GREETING };
        let greeted = pair.carry(&[piece], end == PairEnd::Source, (watch, LOOK_MEETING));
        pair.end_if(greeted)?;
        Ok(pair)
    }
}

/// One end. Fields are dropped in order: the stream waits for what the communicator has queued, which was aborted.
pub(crate) struct NcclPair {
    library: &'static Library,
    /// Null before it was made.
    raw: RawCommunicator,
    /// The other end's number.
    other: c_int,
    done: Event,
    stream: Stream,
    /// Kept, because freeing memory waits for all work of the device.
    greeting: Arc<Buffer>,
}

impl NcclPair {
    /// Waits until the communicator has taken a call in, or has failed.
    fn settle(&self, what: &str, code: c_int, (watch, look): (&Watch, Duration)) -> std::result::Result<(), String> {
        let mut code = code;
        while code == IN_PROGRESS {
            watch.check()?;
            std::thread::sleep(look);
            code = self.fault()?;
        }
        self.library.expect(what, code).map_err(told)
    }

    /// What the communicator says of itself.
    fn fault(&self) -> std::result::Result<c_int, String> {
        if self.raw.is_null() {
            return Err("NCCL made no communicator".into());
        }
        let mut code = SUCCESS;
        // SAFETY: the communicator lives until `self` is dropped, and is used on this thread alone; the pointer is valid for the
        // call.
        let asked = unsafe { (self.library.async_error)(self.raw, &mut code) };
        self.library.expect("watching a pair", asked).map_err(told)?;
        Ok(code)
    }

    fn carry(
        &self,
        parcel: &[Piece],
        sends: bool,
        (watch, look): (&Watch, Duration),
    ) -> std::result::Result<(), String> {
        for Piece { buffer, offset, bytes } in parcel.iter().filter(|piece| piece.bytes > 0) {
            let address = buffer.part(*offset, *bytes).map_err(told)?;
            let stream = self.stream.raw().cast();
            // SAFETY: the range lies inside an allocation (checked above) that the parcel keeps alive until the work is done or
            // was aborted (`Drop`, which comes before the parcel's); the communicator as above.
            let code = unsafe {
                if sends {
                    (self.library.send)(address as *const _, *bytes, library::INT8, self.other, self.raw, stream)
                } else {
                    (self.library.receive)(address as *mut _, *bytes, library::INT8, self.other, self.raw, stream)
                }
            };
            self.settle("queueing a state", code, (watch, look))?;
        }
        self.done.record(&self.stream).map_err(told)?;
        while !self.done.is_done().map_err(told)? {
            let code = self.fault()?;
            if code != IN_PROGRESS {
                self.library.expect("carrying a state", code).map_err(told)?;
            }
            watch.check()?;
            std::thread::sleep(look);
        }
        Ok(())
    }
}

impl PairLink for NcclPair {
    type Parcel = Parcel;

    fn send(&mut self, parcel: &mut Parcel, watch: &Watch) -> std::result::Result<(), String> {
        let sent = self.carry(parcel, true, (watch, LOOK));
        self.end_if(sent)
    }

    fn receive(&mut self, parcel: &mut Parcel, watch: &Watch) -> std::result::Result<(), String> {
        let received = self.carry(parcel, false, (watch, LOOK));
        self.end_if(received)
    }
}

impl NcclPair {
    /// After an error nothing may be queued any more when the parcel goes.
    fn end_if(&mut self, done: std::result::Result<(), String>) -> std::result::Result<(), String> {
        if done.is_err() {
            self.abort();
            // It ends at once: its kernels were told to.
            let _ = self.stream.wait();
        }
        done
    }

    fn abort(&mut self) {
        let raw = std::mem::replace(&mut self.raw, null_mut());
        if !raw.is_null() {
            // SAFETY: the pointer was taken out, so nobody uses the communicator any more. It needs nothing of the other end.
            let _ = unsafe { (self.library.abort)(raw) };
        }
    }
}

impl Drop for NcclPair {
    fn drop(&mut self) {
        self.abort();
    }
}

fn told(error: BackendError) -> String {
    error.to_string()
}

/// The library, or that there are no pairs.
pub(crate) fn transport(device: &Device) -> Result<NcclPairs> {
    let library = Library::get().map_err(|why| BackendError::Unsupported(format!("pairs by NCCL: {why}")))?;
    Ok(NcclPairs::new(library, device))
}
