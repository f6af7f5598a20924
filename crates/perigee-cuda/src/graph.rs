//! A captured sequence of launches: recorded from a stream instead of run, then run as one any number of times. Kernels see the
//! addresses of the recording each time, so whatever they read must lie where it lay.

use cudarc::driver::{result, sys};
use perigee_backend::Result;

use crate::device::{Device, fault};
use crate::stream::Stream;

/// An executable graph.
#[derive(Debug)]
pub(crate) struct Graph {
    executable: sys::CUgraphExec,
    device: Device,
}

// SAFETY: a graph belongs to its context, not to a thread; every call binds the context first.
unsafe impl Send for Graph {}

impl Graph {
    /// Begins a recording on `stream`. Until its end, nothing on this thread may allocate, free or wait.
    pub(crate) fn begin(stream: &Stream) -> Result<()> {
        stream.device().bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive. Other threads may go on allocating, as the mode says.
        unsafe { result::stream::begin_capture(stream.raw(), mode) }.map_err(fault("beginning a recording"))
    }

    /// Ends the recording on `stream` and makes it executable.
    pub(crate) fn end(stream: &Stream) -> Result<Self> {
        stream.device().bind()?;
        // SAFETY: the stream is alive and records (see `begin`).
        let recorded = unsafe { result::stream::end_capture(stream.raw()) }.map_err(fault("ending a recording"))?;
        // SAFETY: the graph was just made; once it is executable, or is not, it is destroyed.
        let executable = unsafe {
            let executable = result::graph::instantiate(recorded, sys::CUgraphInstantiate_flags(0));
            let _ = result::graph::destroy(recorded);
            executable
        };
        Ok(Self {
            executable: executable.map_err(fault("making a recording executable"))?,
            device: stream.device().clone(),
        })
    }

    /// Gives up a recording on `stream` that broke off, if there is one.
    pub(crate) fn abandon(stream: &Stream) {
        if stream.device().bind().is_ok() {
            // SAFETY: the stream is alive; where it records nothing, or the recording is invalid, the driver says so and
            // there is no graph to destroy.
            unsafe {
                if let Ok(recorded) = result::stream::end_capture(stream.raw())
                    && !recorded.is_null()
                {
                    let _ = result::graph::destroy(recorded);
                }
            }
        }
    }

    /// Queues the whole sequence.
    pub(crate) fn launch(&self, stream: &Stream) -> Result<()> {
        self.device.bind()?;
        // SAFETY: graph and stream are alive and of one context. What the recorded kernels address is kept by the backend
        // that recorded them, which forgets a graph before it moves any of that (see `recorder.rs`).
        unsafe { result::graph::launch(self.executable, stream.raw()) }.map_err(fault("running a recorded step"))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made by `end`, destroyed once; the driver lets a run that is under way end first.
            let _ = unsafe { result::graph::exec_destroy(self.executable) };
        }
    }
}
