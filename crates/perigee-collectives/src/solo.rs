//! The group of one rank: nothing to move, only lengths to check. It is what a replica with a tensor-parallel degree of
//! one runs with, and no stand-in for a group whose other ranks are missing.

use crate::rounds::check_gather;
use crate::{Collective, CollectiveError};

/// A group of one.
#[derive(Debug, Default, Clone, Copy)]
pub struct Solo;

impl Collective for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_reduce(&mut self, _data: &mut [f32]) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn all_gather(&mut self, mine: &[f32], counts: &[usize], out: &mut [f32]) -> Result<(), CollectiveError> {
        check_gather(0, 1, mine, counts, out)?;
        out.copy_from_slice(mine);
        Ok(())
    }

    fn broadcast(&mut self, root: usize, _data: &mut [u8]) -> Result<(), CollectiveError> {
        if root == 0 { Ok(()) } else { Err(CollectiveError::RootOutOfRange { root, size: 1 }) }
    }

    fn or(&mut self, _bits: &mut [u64]) -> Result<(), CollectiveError> {
        Ok(())
    }
}
