//! The output head: rows whose logits are wanted, their product with this rank's part of the vocabulary, and the gather from
//! all ranks.

use perigee_backend::{BackendError, DType, Result, TensorSlice};

use crate::backend::CudaBackend;
use crate::blas::{Operands, Product};
use crate::exchange::Exchange;
use crate::needs;
use crate::params::GatherParams;
use crate::stream::Grid;
use crate::tensor::{Matrix, Tensor};

/// This rank's rows of the output head.
#[derive(Debug)]
pub struct Head {
    weight: Matrix,
    counts: Vec<usize>,
}

impl Head {
    /// Rows of every rank, in rank order.
    pub(crate) fn counts(&self) -> &[usize] {
        &self.counts
    }

    /// Rows of the rank that has most.
    pub(crate) fn most_rows(&self) -> usize {
        self.counts.iter().copied().max().unwrap_or(0)
    }
}

impl CudaBackend {
    pub(crate) fn head_load(&mut self, rows: &TensorSlice<'_>, counts: &[usize]) -> Result<Head> {
        let weight = self.load_matrix(rows)?;
        let rank = self.exchange.rank();
        if counts.len() != self.exchange.size() || counts.get(rank) != Some(&weight.rows) {
            return Err(BackendError::shape(format!("rows of {} by rank", rows.name), counts, &[weight.rows]));
        }
        let vocabulary: usize = counts.iter().sum();
        let through_host = matches!(self.exchange, Exchange::Host(_));
        let mine = if through_host { weight.rows } else { 0 };
        self.scratch.require(needs::head(weight.pitch, mine, self.precision.bytes()));
        if vocabulary == 0 {
            return Err(BackendError::shape(&rows.name, &[1, weight.pitch], &rows.shape));
        }
        let head = Head { weight, counts: counts.to_vec() };
        self.head_rows = self.head_rows.max(head.most_rows());
        self.vocabulary = self.vocabulary.max(vocabulary);
        Ok(head)
    }

    pub(crate) fn logits_run(&mut self, head: &Head, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let wanted = self.step.logits.count;
        let (width, vocabulary) = (head.weight.pitch, head.counts.iter().sum());
        self.settle_norm()?;
        x.expect("logits input", self.tokens(), width, self.precision)?;
        out.expect("logits", wanted, vocabulary, DType::Fp32)?;
        if wanted == 0 {
            return Ok(());
        }
        self.scratch.reset();
        let rows = self.logits_rows(x, wanted)?;
        let product =
            Product { result: DType::Fp32, ..Product::dense(wanted, width, head.weight.rows, self.precision) };
        let target = self.logits_place(head, wanted, out)?;
        self.dense(&product, Operands { input: rows, weight: head.weight.address(), out: target })?;
        self.gather_logits(head, wanted, target, out)
    }

    /// Where the rows whose logits are wanted lie one after the other. A recorded step wants those of all rows in their order.
    fn logits_rows(&mut self, x: &Tensor, wanted: usize) -> Result<u64> {
        if self.recorder.is_recording() {
            return Ok(x.address());
        }
        let rows = self.scratch.take(wanted * x.width * self.precision.bytes())?;
        let params = GatherParams {
            table: x.address(),
            indices: self.step.logits.address,
            out: rows,
            first: 0,
            rows: self.tokens() as u32,
            width: x.width as u32,
            reserved: 0,
        };
        self.stream.launch(&self.kernels.gather, Grid::new(wanted, 1, 256), &params)?;
        Ok(rows)
    }
}
