//! Draws that are read later, and steps that are fed with them. On CPUs a step is done when its ops return, so nothing is gained
//! by it: this is the reference of what a device must do, and off unless asked for.

use std::collections::VecDeque;

use perigee_backend::{BackendError, Result};
use perigee_collectives::Collective;
use perigee_sampling::Sampled;

/// What was drawn and not read yet.
#[derive(Debug, Default)]
pub(crate) struct Drawn {
    queued: VecDeque<Vec<Sampled>>,
    /// Tokens of the draws queued last.
    last: Vec<u32>,
    /// Tokens that the next step is fed with.
    fed: Option<Vec<u32>>,
}

impl Drawn {
    pub(crate) fn queue(&mut self, sampled: Vec<Sampled>) {
        self.last = sampled.iter().map(|sampled| sampled.token).collect();
        self.queued.push_back(sampled);
    }

    pub(crate) fn collect(&mut self) -> Result<Vec<Option<Sampled>>> {
        let oldest = self.queued.pop_front().ok_or_else(|| BackendError::Batch("no draws are queued".into()))?;
        Ok(oldest.into_iter().map(Some).collect())
    }

    /// Feeds the next step with these draws; the first rank of the group knows them.
    pub(crate) fn feed(&mut self, from: &[u32], group: &mut dyn Collective) -> Result<()> {
        let mut bytes = vec![0; from.len() * 4];
        if group.rank() == 0 {
            for (bytes, &draw) in bytes.chunks_exact_mut(4).zip(from) {
                let token = self.last.get(draw as usize).ok_or(BackendError::Range {
                    what: "draw that a step is fed with",
                    index: draw.into(),
                    limit: self.last.len() as u64,
                })?;
                bytes.copy_from_slice(&token.to_le_bytes());
            }
        }
        group.broadcast(0, &mut bytes).map_err(|error| BackendError::Collective(error.to_string()))?;
        let token = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        self.fed = Some(bytes.chunks_exact(4).map(token).collect());
        Ok(())
    }

    /// The tokens that this step is fed with, if it is.
    pub(crate) fn take_fed(&mut self) -> Option<Vec<u32>> {
        self.fed.take()
    }
}
