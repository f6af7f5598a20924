//! State slots: for every KDA layer a recurrent matrix per head and the tails of three convolutions, of fixed size whatever
//! the sequence's length. A slot is poisoned until it is cleared, copied or imported.

use perigee_backend::{BackendError, CacheShape, DType, Result, StateKind, StatePart};

/// The tensors of a layer's state, in the order of the seam.
const STATE_KINDS: [StateKind; 4] = [StateKind::Recurrent, StateKind::ConvQ, StateKind::ConvK, StateKind::ConvV];

/// A session's state on this rank.
#[derive(Debug, Clone)]
pub(crate) struct Slot {
    /// [layers, heads, D, D], key index first.
    recurrent: Vec<f32>,
    /// [layers, 3 (q, k, v), heads * D, W - 1], oldest input first.
    conv: Vec<f32>,
}

/// One layer of a slot, to update.
pub(crate) struct LayerState<'a> {
    /// [heads, D, D].
    pub(crate) recurrent: &'a mut [f32],
    /// [3, heads * D, W - 1].
    pub(crate) conv: &'a mut [f32],
}

/// All slots of a rank.
#[derive(Debug)]
pub(crate) struct Slots {
    shape: CacheShape,
    conv_type: DType,
    slots: Vec<Slot>,
}

impl Slots {
    pub(crate) fn new(shape: CacheShape, conv_type: DType) -> Self {
        let slot = Slot {
            recurrent: vec![f32::NAN; shape.kda_layers * recurrent_size(&shape)],
            conv: vec![f32::NAN; shape.kda_layers * 3 * tail_size(&shape)],
        };
        Self { shape, conv_type, slots: vec![slot; shape.slots] }
    }

    fn slot(&mut self, slot: u32) -> Result<&mut Slot> {
        let limit = self.slots.len() as u64;
        self.slots.get_mut(slot as usize).ok_or(BackendError::Range { what: "state slot", index: slot.into(), limit })
    }

    pub(crate) fn fill(&mut self, slots: &[u32], value: f32) -> Result<()> {
        for &slot in slots {
            let slot = self.slot(slot)?;
            slot.recurrent.fill(value);
            slot.conv.fill(value);
        }
        Ok(())
    }

    pub(crate) fn copy(&mut self, from: u32, to: u32) -> Result<()> {
        let copy = self.slot(from)?.clone();
        *self.slot(to)? = copy;
        Ok(())
    }

    /// The states of one layer for (read, write) slot pairs, the write slots all different; where the two differ, the
    /// written one first becomes a copy of the read one. Results are in the order of the pairs.
    pub(crate) fn layer(&mut self, layer: usize, pairs: &[(u32, u32)]) -> Result<Vec<LayerState<'_>>> {
        let (recurrent, tails) = (recurrent_size(&self.shape), 3 * tail_size(&self.shape));
        let in_recurrent = layer * recurrent..(layer + 1) * recurrent;
        let in_tails = layer * tails..(layer + 1) * tails;
        for &(read, write) in pairs.iter().filter(|(read, write)| read != write) {
            let from = self.slot(read)?;
            let (r, c) = (from.recurrent[in_recurrent.clone()].to_vec(), from.conv[in_tails.clone()].to_vec());
            let to = self.slot(write)?;
            to.recurrent[in_recurrent.clone()].copy_from_slice(&r);
            to.conv[in_tails.clone()].copy_from_slice(&c);
        }
        let mut order: Vec<usize> = (0..pairs.len()).collect();
        order.sort_unstable_by_key(|&i| pairs[i].1);
        let mut found = Vec::with_capacity(pairs.len());
        let mut rest = self.slots.iter_mut().enumerate();
        for &i in &order {
            let want = pairs[i].1 as usize;
            let Some((_, slot)) = rest.by_ref().find(|(index, _)| *index == want) else {
                return Err(BackendError::Batch(format!("state slot {want} is missing or written twice")));
            };
            let state = LayerState {
                recurrent: &mut slot.recurrent[in_recurrent.clone()],
                conv: &mut slot.conv[in_tails.clone()],
            };
            found.push((i, state));
        }
        found.sort_unstable_by_key(|(i, _)| *i);
        Ok(found.into_iter().map(|(_, state)| state).collect())
    }

    pub(crate) fn export(&mut self, slot: u32, part: &StatePart) -> Result<Vec<u8>> {
        let kind = self.element_type(part.kind);
        let values = self.part(slot, part)?;
        Ok(to_bytes(values, kind))
    }

    pub(crate) fn import(&mut self, slot: u32, part: &StatePart, bytes: &[u8]) -> Result<()> {
        let kind = self.element_type(part.kind);
        let values = self.part(slot, part)?;
        from_bytes("state part", values, kind, bytes)
    }

    /// Bytes of a slot, all of it, in storage types.
    pub(crate) fn bytes(&self) -> usize {
        let (recurrent, tails) = (recurrent_size(&self.shape), 3 * tail_size(&self.shape));
        self.shape.kda_layers * (recurrent * DType::Fp32.bytes() + tails * self.conv_type.bytes())
    }

    /// A slot as such bytes: recurrent states of all layers, then tails.
    pub(crate) fn whole(&mut self, slot: u32) -> Result<Vec<u8>> {
        let conv_type = self.conv_type;
        let slot = self.slot(slot)?;
        Ok([to_bytes(&slot.recurrent, DType::Fp32), to_bytes(&slot.conv, conv_type)].concat())
    }

    /// The other way.
    pub(crate) fn overwrite(&mut self, slot: u32, bytes: &[u8]) -> Result<()> {
        let (expected, conv_type) = (self.bytes(), self.conv_type);
        let slot = self.slot(slot)?;
        let recurrent = slot.recurrent.len() * DType::Fp32.bytes();
        if bytes.len() != expected {
            return Err(BackendError::shape("bytes of a state slot", &[expected], &[bytes.len()]));
        }
        let (recurrent, conv) = bytes.split_at(recurrent);
        from_bytes("recurrent states", &mut slot.recurrent, DType::Fp32, recurrent)?;
        from_bytes("tails", &mut slot.conv, conv_type, conv)
    }

    /// See [`perigee_backend::Backend::state_sums`].
    pub(crate) fn sums(&mut self, slot: u32, first_head: u32) -> Result<Vec<u64>> {
        let shape = self.shape;
        let (square, tail) = (shape.kda_head_dim * shape.kda_head_dim, shape.kda_head_dim * (shape.conv - 1));
        let mut sums = Vec::with_capacity(shape.kda_layers * STATE_KINDS.len());
        for layer in 0..shape.kda_layers as u32 {
            for kind in STATE_KINDS {
                let part = StatePart { layer, kind, first_head: 0, heads: shape.kda_heads as u32 };
                let first = u64::from(first_head) * if kind == StateKind::Recurrent { square } else { tail } as u64;
                let bytes = self.export(slot, &part)?;
                let words = bytes.chunks_exact(self.element_type(kind).bytes());
                // Little-endian.
                let words = words.map(|word| word.iter().rev().fold(0, |bits, &byte| bits << 8 | u64::from(byte)));
                let numbered = (first + 1..).zip(words);
                sums.push(numbered.fold(0, |sum: u64, (number, bits)| sum.wrapping_add(number.wrapping_mul(bits))));
            }
        }
        Ok(sums)
    }

    fn element_type(&self, kind: StateKind) -> DType {
        if kind == StateKind::Recurrent { DType::Fp32 } else { self.conv_type }
    }

    fn part(&mut self, slot: u32, part: &StatePart) -> Result<&mut [f32]> {
        let shape = self.shape;
        let (layer, first, heads) = (part.layer as usize, part.first_head as usize, part.heads as usize);
        if layer >= shape.kda_layers {
            return Err(BackendError::Range {
                what: "KDA layer",
                index: part.layer.into(),
                limit: shape.kda_layers as u64,
            });
        }
        if first + heads > shape.kda_heads {
            return Err(BackendError::Range {
                what: "KDA head",
                index: (first + heads) as u64,
                limit: shape.kda_heads as u64,
            });
        }
        let square = shape.kda_head_dim * shape.kda_head_dim;
        let tail = shape.kda_head_dim * (shape.conv - 1);
        let slot = self.slot(slot)?;
        Ok(match part.kind {
            StateKind::Recurrent => {
                let start = (layer * shape.kda_heads + first) * square;
                &mut slot.recurrent[start..start + heads * square]
            }
            StateKind::ConvQ | StateKind::ConvK | StateKind::ConvV => {
                let which = match part.kind {
                    StateKind::ConvQ => 0,
                    StateKind::ConvK => 1,
                    _ => 2,
                };
                let start = ((layer * 3 + which) * shape.kda_heads + first) * tail;
                &mut slot.conv[start..start + heads * tail]
            }
        })
    }
}

fn recurrent_size(shape: &CacheShape) -> usize {
    shape.kda_heads * shape.kda_head_dim * shape.kda_head_dim
}

fn tail_size(shape: &CacheShape) -> usize {
    shape.kda_heads * shape.kda_head_dim * (shape.conv - 1)
}

/// Little-endian bytes of values in a storage type.
pub(crate) fn to_bytes(values: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::Fp32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        DType::Bf16 => values.iter().flat_map(|&value| half::bf16::from_f32(value).to_le_bytes()).collect(),
    }
}

/// Overwrites the first values from little-endian bytes; the bytes fill `values` exactly.
pub(crate) fn from_bytes(what: &str, values: &mut [f32], dtype: DType, bytes: &[u8]) -> Result<()> {
    if bytes.len() != values.len() * dtype.bytes() {
        return Err(BackendError::shape(format!("{what} (bytes)"), &[values.len() * dtype.bytes()], &[bytes.len()]));
    }
    match dtype {
        DType::Fp32 => {
            for (value, b) in values.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*b);
            }
        }
        DType::Bf16 => {
            for (value, b) in values.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = half::bf16::from_le_bytes(*b).to_f32();
            }
        }
    }
    Ok(())
}
