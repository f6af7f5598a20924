//! Stored weights and their products with activations. A weight keeps its stored type; products with few rows read it
//! directly, products with many widen it block by block and go through `ndarray`'s matrix multiplication.

use half::bf16;
use ndarray::linalg::general_mat_mul;
use ndarray::{ArrayView2, ArrayViewMut2, ShapeBuilder};
use perigee_backend::{BackendError, DType, Result, TensorSlice};

use crate::simd::{self, Element};
use crate::workers::Workers;

/// Up to this many activation rows, a product reads the weight directly, once for every group of rows.
const DIRECT_ROWS: usize = 16;
/// Weight rows that are widened at a time.
const BLOCK_ROWS: usize = 128;

#[derive(Debug)]
enum Elements {
    Bf16(Vec<bf16>),
    Fp32(Vec<f32>),
}

/// A weight [rows, columns], row-major.
#[derive(Debug)]
pub(crate) struct Matrix {
    rows: usize,
    columns: usize,
    elements: Elements,
}

impl Matrix {
    /// Copies a slice of this shape to memory of its own.
    pub(crate) fn load(slice: &TensorSlice<'_>, rows: usize, columns: usize) -> Result<Self> {
        slice.expect(&[rows, columns])?;
        let elements = match slice.dtype {
            DType::Bf16 => Elements::Bf16(slice.to_bf16()?),
            DType::Fp32 => Elements::Fp32(slice.to_f32()?),
        };
        Ok(Self { rows, columns, elements })
    }

    /// Output width.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Row `index`, widened.
    pub(crate) fn widen_row(&self, index: usize, out: &mut [f32]) {
        let range = index * self.columns..(index + 1) * self.columns;
        match &self.elements {
            Elements::Bf16(all) => simd::widen(&all[range], out),
            Elements::Fp32(all) => simd::widen(&all[range], out),
        }
    }

    /// out [n, rows] = x [n, columns] W^T, spread over the workers.
    pub(crate) fn product(&self, workers: &Workers, x: &[f32], out: &mut [f32]) {
        let per_task = self.rows.div_ceil(workers.threads()).next_multiple_of(BLOCK_ROWS / 4).max(1);
        let parts = self.rows.div_ceil(per_task).max(1);
        if parts == 1 {
            return self.product_rows(0, self.rows, x, self.columns, out, self.rows);
        }
        let n = x.len() / self.columns;
        let tasks: Vec<usize> = (0..parts).map(|part| part * per_task).collect();
        let results = workers.map(tasks, |first| {
            let width = per_task.min(self.rows - first);
            let mut part = vec![0f32; n * width];
            self.product_rows(first, width, x, self.columns, &mut part, width);
            (first, width, part)
        });
        for (first, width, part) in results {
            for (out, part) in out.chunks_exact_mut(self.rows).zip(part.chunks_exact(width)) {
                out[first..first + width].copy_from_slice(part);
            }
        }
    }

    /// out [n, rows] = x [n, columns] W^T on this thread.
    pub(crate) fn product_serial(&self, x: &[f32], out: &mut [f32]) {
        self.product_rows(0, self.rows, x, self.columns, out, self.rows);
    }

    /// out[:, ..count] = x[:, ..columns] W[first..first + count, :]^T where rows of x and out are `x_stride` and
    /// `out_stride` apart.
    pub(crate) fn product_rows(
        &self,
        first: usize,
        count: usize,
        x: &[f32],
        x_stride: usize,
        out: &mut [f32],
        out_stride: usize,
    ) {
        let range = first * self.columns..(first + count) * self.columns;
        let strides = Strides { x: x_stride, out: out_stride };
        match &self.elements {
            Elements::Bf16(all) => product_block(&all[range], self.columns, x, strides, out),
            Elements::Fp32(all) => product_block(&all[range], self.columns, x, strides, out),
        }
    }

    /// out[:, ..columns] = x[:, ..count] W[first..first + count, :] (not transposed), rows `x_stride` and `out_stride`
    /// apart.
    pub(crate) fn product_transposed(
        &self,
        first: usize,
        count: usize,
        x: &[f32],
        x_stride: usize,
        out: &mut [f32],
        out_stride: usize,
    ) {
        let range = first * self.columns..(first + count) * self.columns;
        let strides = Strides { x: x_stride, out: out_stride };
        match &self.elements {
            Elements::Bf16(all) => transposed_block(&all[range], count, self.columns, x, strides, out),
            Elements::Fp32(all) => transposed_block(&all[range], count, self.columns, x, strides, out),
        }
    }
}

#[derive(Clone, Copy)]
struct Strides {
    x: usize,
    out: usize,
}

/// Number of rows of a strided matrix whose last row may be short.
fn strided_rows(length: usize, stride: usize) -> usize {
    length.div_ceil(stride)
}

fn product_block<E: Element>(w: &[E], columns: usize, x: &[f32], strides: Strides, out: &mut [f32]) {
    let n = strided_rows(x.len(), strides.x);
    let count = w.len() / columns;
    if n <= DIRECT_ROWS {
        let rows: Vec<&[f32]> = x.chunks(strides.x).map(|row| &row[..columns]).collect();
        for (group, out) in rows.chunks(simd::GROUP).zip(out.chunks_mut(simd::GROUP * strides.out)) {
            match *group {
                [a, b, c, d] => simd::dot_rows([a, b, c, d], w, out, strides.out),
                [a, b, c] => simd::dot_rows([a, b, c], w, out, strides.out),
                [a, b] => simd::dot_rows([a, b], w, out, strides.out),
                [a] => simd::dot_rows([a], w, out, strides.out),
                _ => {}
            }
        }
        return;
    }
    let mut wide = vec![0f32; BLOCK_ROWS.min(count) * columns];
    for (block, w) in w.chunks(BLOCK_ROWS * columns).enumerate() {
        let wide = &mut wide[..w.len()];
        simd::widen(w, wide);
        let rows = w.len() / columns;
        matmul(
            View { data: x, rows: n, columns, stride: strides.x, transposed: false },
            View { data: wide, rows, columns, stride: columns, transposed: true },
            0.0,
            &mut out[block * BLOCK_ROWS..],
            strides.out,
        );
    }
}

fn transposed_block<E: Element>(w: &[E], count: usize, columns: usize, x: &[f32], strides: Strides, out: &mut [f32]) {
    let n = strided_rows(x.len(), strides.x);
    if n <= DIRECT_ROWS {
        for (x, out) in x.chunks(strides.x).zip(out.chunks_mut(strides.out)) {
            out[..columns].fill(0.0);
            simd::add_scaled_rows(&x[..count], w, &mut out[..columns]);
        }
        return;
    }
    let mut wide = vec![0f32; w.len()];
    simd::widen(w, &mut wide);
    matmul(
        View { data: x, rows: n, columns: count, stride: strides.x, transposed: false },
        View { data: &wide, rows: count, columns, stride: columns, transposed: false },
        0.0,
        out,
        strides.out,
    );
}

/// A strided matrix over a slice; `transposed` swaps its roles of rows and columns in a product.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) stride: usize,
    pub(crate) transposed: bool,
}

impl<'a> View<'a> {
    /// A contiguous matrix.
    pub(crate) fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        Self { data, rows, columns, stride: columns, transposed: false }
    }

    /// The same matrix, transposed in a product.
    pub(crate) fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    fn array(self) -> Option<ArrayView2<'a, f32>> {
        let shape = (self.rows, self.columns).strides((self.stride, 1));
        let array = ArrayView2::from_shape(shape, self.data).ok()?;
        Some(if self.transposed { array.reversed_axes() } else { array })
    }
}

/// out = a b + keep out, with rows of `out` `out_stride` apart. Shapes are the callers' invariant: a mismatch is a bug of
/// this crate, caught by the poison in every output that is then left unwritten.
pub(crate) fn matmul(a: View<'_>, b: View<'_>, keep: f32, out: &mut [f32], out_stride: usize) {
    let (Some(a), Some(b)) = (a.array(), b.array()) else {
        debug_assert!(false, "matrix view exceeds its data");
        return;
    };
    let shape = (a.nrows(), b.ncols()).strides((out_stride, 1));
    let Ok(mut out) = ArrayViewMut2::from_shape(shape, out) else {
        debug_assert!(false, "output view exceeds its data");
        return;
    };
    if keep == 0.0 {
        // 0 times poison is poison.
        out.fill(0.0);
    }
    general_mat_mul(1.0, &a, &b, if keep == 0.0 { 0.0 } else { keep }, &mut out);
}

/// A vector weight of this length, widened.
pub(crate) fn load_vector(slice: &TensorSlice<'_>, length: usize) -> Result<Vec<f32>> {
    slice.expect(&[length])?;
    let values = slice.to_f32()?;
    if values.len() == length {
        return Ok(values);
    }
    Err(BackendError::shape(&slice.name, &[length], &[values.len()]))
}
