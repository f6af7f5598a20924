//! Times on the device, for benchmarks: of any work that a backend queues, and of the copy that floors are held against.

use perigee_backend::Result;

use crate::backend::CudaBackend;
use crate::buffer::Buffer;
use crate::stream::Event;

/// Bytes of the copy that is timed: many times the second-level cache.
const COPY_BYTES: usize = 1 << 30;
/// Copies, of which the median counts.
const COPIES: usize = 9;

impl CudaBackend {
    /// Milliseconds that the device spends on `work`, for measurements.
    ///
    /// # Errors
    /// Those of `work`, and [`perigee_backend::BackendError::Device`] with a fault of the device in it.
    pub fn timed(&mut self, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<f32> {
        let (start, end) = (Event::new(self.stream.device(), true)?, Event::new(self.stream.device(), true)?);
        start.record(&self.stream)?;
        work(self)?;
        end.record(&self.stream)?;
        end.wait()?;
        end.since(&start)
    }

    /// Bytes a second that a copy within the device reads and writes, the median of several.
    ///
    /// # Errors
    /// [`perigee_backend::BackendError::Memory`] where there is no room for two buffers of a gigabyte; a fault of the device.
    pub fn copy_rate(&mut self) -> Result<f64> {
        let from = Buffer::new(self.stream.device(), COPY_BYTES, "source of a timed copy")?;
        let to = Buffer::new(self.stream.device(), COPY_BYTES, "target of a timed copy")?;
        // Not zeros, which a memory may move faster.
        self.stream.fill(&from, 0, COPY_BYTES, 0x3f81)?;
        let once = |backend: &mut Self| backend.timed(|b| b.stream.copy(&from, 0, &to, 0, COPY_BYTES));
        once(self)?;
        let mut times = (0..COPIES).map(|_| once(self)).collect::<Result<Vec<_>>>()?;
        times.sort_by(f32::total_cmp);
        Ok(2.0 * COPY_BYTES as f64 / (f64::from(times[COPIES / 2]) / 1e3))
    }
}
