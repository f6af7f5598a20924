//! The compute stream: launches, copies and fills in order, and the wait for them. Every copy checks its ranges. Other
//! streams (remote attention, copies) will be further values of the same type, ordered by events.

use std::ops::Range;

use bytemuck::Pod;
use cudarc::driver::result::stream::StreamKind;
use cudarc::driver::{result, sys};
use perigee_backend::{BackendError, Result};

use crate::buffer::{Buffer, Pinned};
use crate::device::{Device, fault};
use crate::module::Kernel;

/// Blocks and threads of a launch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grid {
    pub(crate) blocks: (u32, u32, u32),
    pub(crate) threads: u32,
    /// Dynamic shared memory of a block in bytes.
    pub(crate) shared: u32,
}

impl Grid {
    /// A grid without dynamic shared memory; sizes beyond 32 bits saturate and fail at the launch.
    pub(crate) fn new(x: usize, y: usize, threads: u32) -> Self {
        let narrow = |value| u32::try_from(value).unwrap_or(u32::MAX);
        Self { blocks: (narrow(x), narrow(y), 1), threads, shared: 0 }
    }

    /// The same with dynamic shared memory.
    pub(crate) fn shared(self, bytes: usize) -> Self {
        Self { shared: u32::try_from(bytes).unwrap_or(u32::MAX), ..self }
    }
}

/// Rows in a buffer, by bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pitched<'a> {
    pub(crate) buffer: &'a Buffer,
    pub(crate) offset: usize,
    pub(crate) pitch: usize,
}

impl Pitched<'_> {
    /// Address of the first of `rows` rows of `bytes`, after checking that the last lies inside.
    fn part(&self, bytes: usize, rows: usize) -> Result<u64> {
        self.buffer.part(self.offset, rows.saturating_sub(1) * self.pitch + bytes)
    }
}

/// An ordered queue of device work.
#[derive(Debug)]
pub(crate) struct Stream {
    raw: sys::CUstream,
    device: Device,
}

impl Stream {
    pub(crate) fn new(device: &Device) -> Result<Self> {
        device.bind()?;
        let raw = result::stream::create(StreamKind::NonBlocking).map_err(fault("creating a stream"))?;
        Ok(Self { raw, device: device.clone() })
    }

    /// A stream whose blocks go first where the device has not room for those of all streams: that of steps, beside which others
    /// answer other replicas and send states. Graphs that are captured on it have its priority.
    pub(crate) fn first(device: &Device) -> Result<Self> {
        device.bind()?;
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: the context is current (bound above), the out-pointers are valid for the call.
        unsafe { sys::cuCtxGetStreamPriorityRange(&mut least, &mut greatest) }
            .result()
            .map_err(fault("asking for priorities"))?;
        let raw = result::stream::create_with_priority(StreamKind::NonBlocking, greatest);
        Ok(Self { raw: raw.map_err(fault("creating a stream"))?, device: device.clone() })
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    pub(crate) fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// Queues a kernel. An empty grid is no work.
    pub(crate) fn launch<P: Pod>(&self, kernel: &Kernel<P>, grid: Grid, argument: &P) -> Result<()> {
        if grid.blocks.0 == 0 || grid.blocks.1 == 0 || grid.blocks.2 == 0 {
            return Ok(());
        }
        kernel.note_launch();
        self.device.bind()?;
        let mut pointers = [std::ptr::from_ref(argument).cast_mut().cast()];
        let mut ahead = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let launch = sys::CUlaunchConfig {
            gridDimX: grid.blocks.0,
            gridDimY: grid.blocks.1,
            gridDimZ: grid.blocks.2,
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared,
            hStream: self.raw,
            attrs: &mut ahead,
            numAttrs: u32::from(kernel.may_begin_ahead()),
        };
        // SAFETY: the kernel's module is loaded and its one argument has exactly the size of `P` (checked by
        // `Modules::kernel`); the driver copies the argument before it returns. Arguments hold addresses of device
        // allocations only, never of host memory, so a wrong index in a kernel can fault the context or spoil device
        // results but cannot touch memory that Rust owns.
        unsafe { sys::cuLaunchKernelEx(&launch, kernel.function(), pointers.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .map_err(|error| BackendError::Device(format!("launching {} with {grid:?}: {error:?}", kernel.name())))
    }

    /// Copies host bytes to the device in stream order. The bytes are taken before the call returns.
    pub(crate) fn write(&self, to: &Buffer, offset: usize, bytes: &[u8]) -> Result<()> {
        let address = to.part(offset, bytes.len())?;
        if bytes.is_empty() {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: the destination range lies inside its allocation; from pageable memory the driver copies into its own
        // staging before it returns, and the wait below makes that hold for page-locked memory too.
        unsafe { result::memcpy_htod_async(address, bytes, self.raw) }.map_err(fault("copying to the device"))?;
        self.wait()
    }

    /// Queues a copy of some page-locked bytes. The owner of `from` keeps them unchanged until the copy is done.
    pub(crate) fn write_pinned(&self, to: &Buffer, offset: usize, from: &Pinned, range: Range<usize>) -> Result<()> {
        let address = to.part(offset, range.len())?;
        self.device.bind()?;
        let limit = from.as_slice().len();
        let missing = BackendError::Range { what: "page-locked byte", index: range.end as u64, limit: limit as u64 };
        let source = from.as_slice().get(range).ok_or(missing)?;
        if source.is_empty() {
            return Ok(());
        }
        // SAFETY: both ranges were checked. `Upload` owns `from` and waits on an event recorded after this copy before it
        // refills or drops it; a `Lane` of the reader and the cache wait for the stream before they do, or have dropped it
        // before.
        unsafe { result::memcpy_htod_async(address, source, self.raw) }.map_err(fault("copying to the device"))
    }

    /// Queues a copy to some page-locked bytes. The owner of `to` neither reads nor drops them until the copy is done.
    pub(crate) fn read_pinned(&self, from: &Buffer, offset: usize, to: &mut Pinned, range: Range<usize>) -> Result<()> {
        let address = from.part(offset, range.len())?;
        self.device.bind()?;
        let limit = to.as_slice().len();
        let missing = BackendError::Range { what: "page-locked byte", index: range.end as u64, limit: limit as u64 };
        let room = to.as_mut_slice().get_mut(range).ok_or(missing)?;
        if room.is_empty() {
            return Ok(());
        }
        // SAFETY: both ranges were checked; `Download` owns `to` and waits on an event recorded after this copy before it reads,
        // refills or drops it, the cache waits for the stream.
        unsafe { result::memcpy_dtoh_async(room, address, self.raw) }.map_err(fault("copying to the host"))
    }

    /// Copies to the host and waits for it.
    pub(crate) fn read(&self, from: &Buffer, offset: usize, bytes: &mut [u8]) -> Result<()> {
        let address = from.part(offset, bytes.len())?;
        if bytes.is_empty() {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: the source range lies inside its allocation; `bytes` stays borrowed until the wait below returns.
        unsafe { result::memcpy_dtoh_async(bytes, address, self.raw) }.map_err(fault("copying to the host"))?;
        self.wait()
    }

    /// Copies within the device; the ranges are of different buffers or do not overlap.
    pub(crate) fn copy(
        &self,
        from: &Buffer,
        from_offset: usize,
        to: &Buffer,
        to_offset: usize,
        bytes: usize,
    ) -> Result<()> {
        let source = from.part(from_offset, bytes)?;
        let target = to.part(to_offset, bytes)?;
        if bytes == 0 || source == target {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: both ranges lie inside live allocations.
        unsafe { result::memcpy_dtod_async(target, source, bytes, self.raw) }.map_err(fault("copying on the device"))
    }

    /// Copies rows of `bytes` between buffers of different pitch within the device.
    pub(crate) fn copy_rows(&self, from: Pitched<'_>, to: Pitched<'_>, bytes: usize, rows: usize) -> Result<()> {
        if bytes == 0 || rows == 0 {
            return Ok(());
        }
        let copy = sys::CUDA_MEMCPY2D_st {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: sys::CUmemorytype_enum::CU_MEMORYTYPE_DEVICE,
            srcHost: std::ptr::null(),
            srcDevice: from.part(bytes, rows)?,
            srcArray: std::ptr::null_mut(),
            srcPitch: from.pitch,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: sys::CUmemorytype_enum::CU_MEMORYTYPE_DEVICE,
            dstHost: std::ptr::null_mut(),
            dstDevice: to.part(bytes, rows)?,
            dstArray: std::ptr::null_mut(),
            dstPitch: to.pitch,
            WidthInBytes: bytes,
            Height: rows,
        };
        self.device.bind()?;
        // SAFETY: both ranges, first row to last, lie inside live allocations; the driver reads `copy` before it returns.
        unsafe { sys::cuMemcpy2DAsync_v2(&copy, self.raw) }.result().map_err(fault("copying rows on the device"))
    }

    /// Fills a range with a repeated 16-bit pattern; offset and size are even.
    pub(crate) fn fill(&self, to: &Buffer, offset: usize, bytes: usize, pattern: u16) -> Result<()> {
        let address = to.part(offset, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: the range lies inside a live allocation, and the context is that of the stream.
        unsafe { sys::cuMemsetD16Async(address, pattern, bytes / 2, self.raw) }
            .result()
            .map_err(fault("filling device memory"))
    }

    /// Waits until all queued work is done.
    pub(crate) fn wait(&self) -> Result<()> {
        self.device.bind()?;
        // SAFETY: the stream is alive as long as `self`.
        unsafe { result::stream::synchronize(self.raw) }.map_err(fault("waiting for the device"))
    }
}

// SAFETY: a stream belongs to its context, not to a thread; every call binds the context first.
unsafe impl Send for Stream {}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: the stream was created by `new` and is destroyed once; queued work is finished first.
            unsafe {
                let _ = result::stream::synchronize(self.raw);
                let _ = result::stream::destroy(self.raw);
            }
        }
    }
}

/// A point in a stream.
#[derive(Debug)]
pub(crate) struct Event {
    raw: sys::CUevent,
    device: Device,
}

impl Event {
    /// An event; `timed` ones can be subtracted.
    pub(crate) fn new(device: &Device, timed: bool) -> Result<Self> {
        device.bind()?;
        let flags =
            if timed { sys::CUevent_flags::CU_EVENT_DEFAULT } else { sys::CUevent_flags::CU_EVENT_DISABLE_TIMING };
        let raw = result::event::create(flags).map_err(fault("creating an event"))?;
        Ok(Self { raw, device: device.clone() })
    }

    pub(crate) fn record(&self, stream: &Stream) -> Result<()> {
        // SAFETY: event and stream are alive and of the same context.
        unsafe { result::event::record(self.raw, stream.raw) }.map_err(fault("recording an event"))
    }

    /// Waits until the work before the last record is done; at once if there was none.
    pub(crate) fn wait(&self) -> Result<()> {
        self.device.bind()?;
        // SAFETY: the event is alive as long as `self`.
        unsafe { result::event::synchronize(self.raw) }.map_err(fault("waiting for an event"))
    }

    /// Whether the work before the last record is done.
    pub(crate) fn is_done(&self) -> Result<bool> {
        self.device.bind()?;
        // SAFETY: the event is alive as long as `self`.
        match unsafe { sys::cuEventQuery(self.raw) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            other => other.result().map(|()| true).map_err(fault("looking at an event")),
        }
    }

    /// Milliseconds from `start` to this event; both timed, recorded and done.
    pub(crate) fn since(&self, start: &Event) -> Result<f32> {
        // SAFETY: both events are alive.
        unsafe { result::event::elapsed(start.raw, self.raw) }.map_err(fault("reading a time"))
    }
}

// SAFETY: as for `Stream`.
unsafe impl Send for Event {}

impl Drop for Event {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: created by `new`, destroyed once; the driver defers it while a record is pending.
            let _ = unsafe { result::event::destroy(self.raw) };
        }
    }
}
