//! Embedding rows of the step's tokens.

use perigee_backend::{BackendError, DType, Result, TensorSlice};

use crate::backend::CudaBackend;
use crate::loader::{Loader, Placement};
use crate::params::GatherParams;
use crate::stream::Grid;
use crate::tensor::{Matrix, Tensor};

/// This rank's rows of the embedding table.
#[derive(Debug)]
pub struct Embedding {
    table: Matrix,
    first: usize,
}

impl CudaBackend {
    pub(crate) fn embed_load(&mut self, rows: &TensorSlice<'_>, first: usize) -> Result<Embedding> {
        Ok(Embedding { table: self.load_matrix(rows)?, first })
    }

    /// A whole slice as a matrix in the activation type.
    pub(crate) fn load_matrix(&mut self, slice: &TensorSlice<'_>) -> Result<Matrix> {
        let &[rows, columns] = slice.shape.as_slice() else {
            return Err(BackendError::Shape {
                what: slice.name.clone(),
                expected: "two dimensions".into(),
                found: format!("{:?}", slice.shape),
            });
        };
        let matrix = Loader::matrix(&self.stream, rows, columns, self.precision, &slice.name)?;
        self.loader.place(&self.stream, &self.kernels, slice, &matrix, Placement::at(0))?;
        Ok(matrix)
    }

    pub(crate) fn embed_run(&self, table: &Embedding, out: &Tensor) -> Result<()> {
        out.expect("embed output", self.tokens(), table.table.pitch, DType::Fp32)?;
        let params = GatherParams {
            table: table.table.address(),
            indices: self.step.tokens.address,
            out: out.address(),
            first: table.first as u32,
            rows: table.table.rows as u32,
            width: table.table.pitch as u32,
            reserved: 0,
        };
        self.stream.launch(&self.kernels.gather_widened, Grid::new(self.tokens(), 1, 256), &params)
    }
}
