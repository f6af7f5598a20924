//! A KDA layer on a backend beside the same layer in the reference: runs steps, and moves states in and out of slots.

use crate::batch::{Row, Segment};
use crate::error::Result;
use crate::ops::{Backend, StateKind, StatePart};
use crate::shapes::{CacheShape, KdaShape};
use crate::weights::DType;

use super::Factory;
use super::check::{Checks, Quantity};
use super::draw::{decode, encode};
use super::harness::{Harness, MAX_TOKENS, small_cache};
use super::reference::kda::{KdaLayer, KdaState};

/// The four tensors in the order used here: the recurrent state, then the tails of q, k, v.
pub(super) const KINDS: [StateKind; 4] = [StateKind::Recurrent, StateKind::ConvQ, StateKind::ConvK, StateKind::ConvV];

/// State slots of every KDA case.
pub(super) const SLOTS: u32 = 12;

/// Layers of the cache; cases run the last, and the first must keep its poison.
const LAYERS: usize = 2;

/// A row of a step.
pub(super) struct KdaRow<'a> {
    pub(super) read: u32,
    pub(super) write: u32,
    pub(super) position: usize,
    /// [tokens, d].
    pub(super) x: &'a [f64],
}

/// The layer under test.
pub(super) struct KdaBench<'m, B: Backend> {
    pub(super) harness: Harness<B>,
    pub(super) model: &'m KdaLayer,
    layer: B::Kda,
    x: B::Tensor,
    out: B::Tensor,
}

/// The cache that a KDA case needs.
pub(super) fn kda_cache(shape: &KdaShape) -> CacheShape {
    CacheShape {
        kda_layers: LAYERS,
        kda_heads: shape.heads,
        kda_head_dim: shape.head_dim,
        conv: shape.conv,
        slots: SLOTS as usize,
        ..small_cache()
    }
}

impl<'m, B: Backend> KdaBench<'m, B> {
    pub(super) fn open<F: Factory<B = B>>(factory: &mut F, model: &'m KdaLayer) -> Result<Self> {
        Self::with_slots(factory, model, SLOTS as usize)
    }

    /// With another number of state slots.
    pub(super) fn with_slots<F: Factory<B = B>>(factory: &mut F, model: &'m KdaLayer, slots: usize) -> Result<Self> {
        let cache = CacheShape { slots, ..kda_cache(&model.shape) };
        let (mut harness, layer) =
            Harness::open(factory, cache, |backend: &mut B| backend.load_kda(&model.shape, &model.weights()))?;
        let (x, out) = (harness.activations(model.shape.hidden)?, harness.activations(model.shape.hidden)?);
        Ok(Self { harness, model, layer, x, out })
    }

    /// Runs one step on the last layer; returns the outputs of all its tokens.
    pub(super) fn step(&mut self, rows: &[KdaRow<'_>]) -> Result<Vec<f32>> {
        let width = self.model.shape.hidden;
        let row = |row: &KdaRow<'_>| {
            let (start, tokens) = (row.position as u64, (row.x.len() / width) as u64);
            let pages = (0..Segment::pages_for(start, start + tokens) as u32).collect();
            Row {
                tokens: tokens as u32,
                position: start,
                read_slot: row.read,
                write_slot: row.write,
                segments: vec![Segment { start, end: start + tokens, pages }],
            }
        };
        let x: Vec<f64> = rows.iter().flat_map(|row| row.x).copied().collect();
        debug_assert!(x.len() <= MAX_TOKENS * width, "a case exceeds the room for tokens");
        self.harness.begin(rows.iter().map(row).collect())?;
        self.harness.upload(&mut self.x, &x)?;
        self.harness.backend.kda_mixer(&self.layer, LAYERS - 1, &self.x, &mut self.out)?;
        self.harness.backend.read(&self.out, x.len() / width)
    }

    /// Storage type of a state tensor.
    pub(super) fn dtype(&self, kind: StateKind) -> DType {
        if kind == StateKind::Recurrent { DType::Fp32 } else { self.harness.activation }
    }

    /// Elements of one head of a state tensor.
    pub(super) fn head_elements(&self, kind: StateKind) -> usize {
        let shape = &self.model.shape;
        shape.head_dim * if kind == StateKind::Recurrent { shape.head_dim } else { shape.conv - 1 }
    }

    /// All heads of a tensor of a layer.
    pub(super) fn part(&self, layer: usize, kind: StateKind) -> StatePart {
        StatePart { layer: layer as u32, kind, first_head: 0, heads: self.model.shape.heads as u32 }
    }

    /// The four tensors of the last layer in a slot, as bytes.
    pub(super) fn export(&mut self, slot: u32) -> Result<Vec<Vec<u8>>> {
        self.export_layer(slot, LAYERS - 1)
    }

    fn export_layer(&mut self, slot: u32, layer: usize) -> Result<Vec<Vec<u8>>> {
        let parts = KINDS.map(|kind| self.part(layer, kind));
        parts.iter().map(|part| self.harness.backend.export_state(slot, part)).collect()
    }

    /// Puts a state into the last layer of a slot.
    pub(super) fn import(&mut self, slot: u32, state: &KdaState) -> Result<()> {
        for (kind, values) in KINDS.into_iter().zip(tensors(state)) {
            let (part, bytes) = (self.part(LAYERS - 1, kind), encode(values, self.dtype(kind)));
            self.harness.backend.import_state(slot, &part, &bytes)?;
        }
        Ok(())
    }

    /// The last layer of a slot holds this state.
    pub(super) fn check_state(
        &mut self,
        checks: &mut Checks,
        what: &str,
        slot: u32,
        expected: &KdaState,
    ) -> Result<()> {
        let found = self.export(slot)?;
        for ((kind, bytes), expected) in KINDS.into_iter().zip(found).zip(tensors(expected)) {
            let quantity = if kind == StateKind::Recurrent { Quantity::KdaState } else { Quantity::ConvTail };
            let found = decode(&bytes, self.dtype(kind));
            checks.close(&format!("{kind:?} after {what}"), quantity, self.head_elements(kind), &found, expected);
        }
        Ok(())
    }

    /// These slots, and the first layer of all slots, are still poison.
    pub(super) fn check_poison(&mut self, checks: &mut Checks, unused: &[u32]) -> Result<()> {
        let places = unused.iter().map(|&slot| (slot, LAYERS - 1)).chain((0..SLOTS).map(|slot| (slot, 0)));
        for (slot, layer) in places {
            if self.harness.cache.slots <= slot as usize {
                continue;
            }
            for (kind, bytes) in KINDS.into_iter().zip(self.export_layer(slot, layer)?) {
                let found = decode(&bytes, self.dtype(kind));
                checks.poisoned(&format!("{kind:?} of layer {layer} in unused slot {slot}"), &found);
            }
        }
        Ok(())
    }

    /// Poisons slots, then clears them in the last layer only, by importing an empty state: layer 0 stays poison.
    pub(super) fn start_empty(&mut self, slots: &[u32]) -> Result<()> {
        self.harness.backend.poison_slots(slots)?;
        let empty = KdaState::empty(&self.model.shape);
        slots.iter().try_for_each(|&slot| self.import(slot, &empty))
    }
}

fn tensors(state: &KdaState) -> [&[f64]; 4] {
    let [q, k, v] = &state.tails;
    [&state.recurrent, q, k, v]
}
