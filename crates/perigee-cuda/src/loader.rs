//! Weights onto the device: allocates matrices, sends stored bytes through page-locked staging memory (one piece is read from
//! its file while the one before is on its way) or lets the device follow the random rule, and places rows where an op wants
//! them. It counts the bytes that it loaded.

use bytemuck::Zeroable;
use perigee_backend::random::{Distribution, RandomFill};
use perigee_backend::{BackendError, DType, Result, TensorSlice, TensorSource};

use crate::buffer::Buffer;
use crate::kernels::Kernels;
use crate::params::LoadParams;
use crate::stream::{Grid, Stream};
use crate::tensor::Matrix;
use crate::transfer::Upload;

const STAGE_BYTES: usize = 64 << 20;

/// Where the rows of a slice go: row i to `offset + (i / group) * group_pitch + i % group`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Placement {
    pub(crate) offset: usize,
    pub(crate) group: usize,
    pub(crate) group_pitch: usize,
}

impl Placement {
    /// One row after the other, from `offset`.
    pub(crate) fn at(offset: usize) -> Self {
        Self { offset, group: 1, group_pitch: 1 }
    }

    fn end(self, rows: usize) -> usize {
        let last = rows.saturating_sub(1);
        self.offset + last / self.group * self.group_pitch + last % self.group + 1
    }
}

/// Loads weights; keeps the staging buffer between loads.
#[derive(Debug, Default)]
pub(crate) struct Loader {
    stage: Option<Upload>,
    /// Room for two matrices in a wider type than they are kept in.
    wide: [Option<Buffer>; 2],
    bytes: u64,
}

impl Loader {
    /// Bytes of all slices loaded so far, as stored.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Frees the staging buffer; the next load makes a new one.
    pub(crate) fn finish(&mut self) {
        self.stage = None;
    }

    /// Makes room for [`Self::widened`] of such matrices.
    pub(crate) fn reserve_widened(&mut self, stream: &Stream, matrices: [&Matrix; 2], target: DType) -> Result<()> {
        for (matrix, room) in matrices.into_iter().zip(&mut self.wide) {
            let bytes = matrix.rows * matrix.pitch * target.bytes();
            if matrix.dtype != target && room.as_ref().is_none_or(|room| room.bytes() < bytes) {
                *room = None;
                *room = Some(Buffer::new(stream.device(), bytes, "weights in the type of products")?);
            }
        }
        Ok(())
    }

    /// Device addresses of two matrices in the type `target`: their own, or those of copies that hold until the next call.
    pub(crate) fn widened(
        &self,
        stream: &Stream,
        kernels: &Kernels,
        matrices: [&Matrix; 2],
        target: DType,
    ) -> Result<[u64; 2]> {
        let mut addresses = matrices.map(Matrix::address);
        for ((matrix, room), address) in matrices.into_iter().zip(&self.wide).zip(&mut addresses) {
            if matrix.dtype == target {
                continue;
            }
            let Some(room) = room else {
                return Err(BackendError::Device("no room was made for widened weights".into()));
            };
            let params = LoadParams {
                source: matrix.address(),
                destination: room.part(0, matrix.rows * matrix.pitch * target.bytes())?,
                rows: matrix.rows as u64,
                columns: matrix.pitch as u64,
                pitch: matrix.pitch as u64,
                row_stride: matrix.pitch as u64,
                kind: if matrix.dtype == DType::Bf16 { 3 } else { 4 },
                stored_bf16: u32::from(matrix.dtype == DType::Bf16),
                ..placed(Placement::at(0))
            };
            run(stream, kernels, target, &params)?;
            *address = room.address();
        }
        Ok(addresses)
    }

    /// A matrix of zeros.
    pub(crate) fn matrix(stream: &Stream, rows: usize, pitch: usize, dtype: DType, what: &str) -> Result<Matrix> {
        let bytes = rows * pitch * dtype.bytes();
        let buffer = Buffer::new(stream.device(), bytes, what)?;
        stream.fill(&buffer, 0, bytes, 0)?;
        Ok(Matrix { buffer, rows, pitch, dtype })
    }

    /// Sends a slice of shape [rows, columns] into `matrix`.
    pub(crate) fn place(
        &mut self,
        stream: &Stream,
        kernels: &Kernels,
        slice: &TensorSlice<'_>,
        matrix: &Matrix,
        placement: Placement,
    ) -> Result<()> {
        let columns = slice.shape.last().copied().unwrap_or(0);
        let rows = slice.elements().checked_div(columns).unwrap_or(0);
        if columns > matrix.pitch || placement.end(rows) > matrix.rows {
            return Err(BackendError::shape(&slice.name, &[matrix.rows, matrix.pitch], &slice.shape));
        }
        let mut params = LoadParams {
            destination: matrix.address(),
            rows: rows as u64,
            columns: columns as u64,
            pitch: matrix.pitch as u64,
            row_stride: columns as u64,
            stored_bf16: u32::from(slice.dtype == DType::Bf16),
            ..placed(placement)
        };
        match &slice.source {
            TensorSource::Random(fill) => {
                describe(fill, &mut params);
                run(stream, kernels, matrix.dtype, &params)?;
            }
            TensorSource::Bytes(bytes) => {
                if bytes.len() as u64 != slice.bytes() {
                    let expected = slice.bytes() as usize;
                    return Err(BackendError::shape(format!("{} (bytes)", slice.name), &[expected], &[bytes.len()]));
                }
                params.kind = if slice.dtype == DType::Bf16 { 3 } else { 4 };
                let job = Job { params, placement, stored: slice.dtype, target: matrix.dtype };
                self.send(stream, kernels, bytes, &job)?;
            }
        }
        self.bytes += slice.bytes();
        Ok(())
    }

    /// A vector, or a small matrix as one, in float32.
    pub(crate) fn vector(&mut self, stream: &Stream, kernels: &Kernels, slice: &TensorSlice<'_>) -> Result<Buffer> {
        let matrix = Self::matrix(stream, 1, slice.elements(), DType::Fp32, &slice.name)?;
        let flat = TensorSlice { shape: vec![slice.elements()], ..slice.clone() };
        let is_random_matrix = slice.shape.len() > 1 && matches!(slice.source, TensorSource::Random(_));
        if is_random_matrix {
            // A random slice of several rows has a stride of its own between them.
            let values = slice.to_f32()?;
            stream.write(&matrix.buffer, 0, bytemuck::cast_slice(&values))?;
            self.bytes += slice.bytes();
        } else {
            self.place(stream, kernels, &flat, &matrix, Placement::at(0))?;
        }
        Ok(matrix.buffer)
    }

    /// Values made on the host, in float32; `stored` is what they count as.
    pub(crate) fn values(&mut self, stream: &Stream, values: &[f32], stored: u64, what: &str) -> Result<Buffer> {
        let buffer = Buffer::new(stream.device(), size_of_val(values), what)?;
        stream.write(&buffer, 0, bytemuck::cast_slice(values))?;
        self.bytes += stored;
        Ok(buffer)
    }

    /// Stored bytes, in as many pieces as the staging buffer needs; pieces hold whole groups of rows.
    fn send(&mut self, stream: &Stream, kernels: &Kernels, bytes: &[u8], job: &Job) -> Result<()> {
        let row_bytes = job.params.columns as usize * job.stored.bytes();
        let group_bytes = (row_bytes * job.placement.group).max(1);
        let groups = (STAGE_BYTES / group_bytes).max(1);
        let size = STAGE_BYTES.max(group_bytes);
        if self.stage.as_ref().is_none_or(|stage| stage.capacity() < size) {
            self.stage = Some(Upload::new(stream.device(), size, "staging of weights")?);
        }
        let Some(stage) = &mut self.stage else { return Ok(()) };
        for (index, piece) in bytes.chunks(groups * group_bytes).enumerate() {
            stage.send(stream, piece)?;
            let piece_params = LoadParams {
                source: stage.address(),
                rows: (piece.len() / row_bytes.max(1)) as u64,
                row_offset: (job.placement.offset + index * groups * job.placement.group_pitch) as u64,
                ..job.params
            };
            run(stream, kernels, job.target, &piece_params)?;
        }
        Ok(())
    }
}

/// Parameters of rows placed like this, of which nothing else is known.
fn placed(placement: Placement) -> LoadParams {
    LoadParams {
        row_offset: placement.offset as u64,
        group: placement.group as u64,
        group_pitch: placement.group_pitch as u64,
        ..LoadParams::zeroed()
    }
}

/// Stored rows on their way.
struct Job {
    params: LoadParams,
    placement: Placement,
    stored: DType,
    target: DType,
}

/// Factor of the centred sum of a normal element, in the one float32 operation that the host's rule does first.
fn normal_factor(deviation: f32) -> f32 {
    2.642_899_8e-5 * deviation
}

fn describe(fill: &RandomFill, params: &mut LoadParams) {
    params.key = fill.key;
    params.first = fill.first;
    params.row_stride = fill.row_stride;
    match fill.distribution {
        Distribution::Constant(value) => {
            params.kind = 0;
            params.a = value;
        }
        Distribution::Uniform { low, high } => {
            params.kind = 1;
            params.a = low;
            params.b = high - low;
        }
        Distribution::Normal { deviation } => {
            params.kind = 2;
            params.a = normal_factor(deviation);
        }
    }
}

fn run(stream: &Stream, kernels: &Kernels, target: DType, params: &LoadParams) -> Result<()> {
    let kernel = match target {
        DType::Bf16 => &kernels.load_bf16,
        DType::Fp32 => &kernels.load_fp32,
    };
    let elements = (params.rows * params.columns) as usize;
    stream.launch(kernel, Grid::new(elements.div_ceil(256).min(1 << 16), 1, 256), params)
}

#[cfg(test)]
mod tests {
    use perigee_backend::random::element;

    use super::*;

    #[test]
    fn the_normal_factor_is_that_of_the_host_rule() {
        let deviation = 0.02;
        for index in 0..1000 {
            let value = element(11, Distribution::Normal { deviation }, index);
            let centred = (value / normal_factor(deviation)).round();
            assert_eq!(value.to_bits(), (centred * normal_factor(deviation)).to_bits(), "element {index}");
        }
    }

    #[test]
    fn interleaved_rows_end_where_the_last_one_lies() {
        let up = Placement { offset: 8, group: 8, group_pitch: 16 };
        assert_eq!(up.end(8), 16);
        assert_eq!(up.end(12), 8 + 16 + 4);
        assert_eq!(Placement::at(3).end(5), 8);
    }
}
