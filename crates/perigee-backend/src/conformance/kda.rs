//! Cases of the KDA mixer: lengths around chunk edges, any chunking, any mix of rows, transactions, and gates from no decay
//! to -80 a step. Every slot that a step does not name is poison and stays so.

use crate::error::Result;
use crate::ops::Backend;
use crate::shapes::KdaShape;

use super::check::{Checks, Quantity};
use super::draw::{Draw, Origin};
use super::kda_bench::{KINDS, KdaBench, KdaRow, SLOTS};
use super::reference::kda::{Gates, KdaLayer, KdaState};
use super::{Case, Factory};

const LENGTHS: [usize; 13] = [1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200];

fn shape(hidden: usize, heads: usize, head_dim: usize, conv: usize) -> KdaShape {
    KdaShape { hidden, heads, head_dim, conv, eps: 1e-5 }
}

pub(super) fn cases<F: Factory>() -> Vec<Case<F>> {
    let variants = [
        (shape(64, 1, 32, 4), Gates::Mixed),
        (shape(64, 4, 32, 4), Gates::Burst),
        (shape(64, 2, 32, 3), Gates::Mixed),
        (shape(64, 2, 32, 2), Gates::Mixed),
        (shape(64, 3, 64, 4), Gates::Mixed),
        (shape(64, 1, 64, 4), Gates::Repeat),
        (shape(128, 2, 128, 4), Gates::Mixed),
        (shape(128, 2, 128, 4), Gates::Burst),
        (shape(128, 1, 128, 4), Gates::Strong),
        (shape(128, 1, 128, 4), Gates::Open),
        (shape(128, 1, 128, 4), Gates::Repeat),
        (shape(48, 2, 24, 4), Gates::Mixed),
    ];
    let mut cases = Vec::new();
    for (number, (shape, gates)) in variants.into_iter().enumerate() {
        let KdaShape { heads, head_dim, conv, .. } = shape;
        let variant = format!("{heads}x{head_dim}, conv {conv}, {gates:?}");
        for (what, body) in [
            ("lengths", lengths::<F> as fn(&mut F, &mut Checks, &KdaLayer) -> Result<()>),
            ("chunks", chunks::<F>),
            ("prior state", prior_state::<F>),
            ("batch", batch::<F>),
            ("transaction", transaction::<F>),
        ] {
            cases.push(Case::new(format!("kda_mixer/{what}/{variant}"), move |factory: &mut F, checks| {
                body(factory, checks, &KdaLayer::draw(shape, gates, 31 + number as u64, Origin::Bytes))
            }));
        }
    }
    for shape in [shape(64, 3, 64, 4), shape(128, 2, 128, 4)] {
        let name = format!("kda_mixer/many rows/{}x{}", shape.heads, shape.head_dim);
        cases.push(Case::new(name, move |factory: &mut F, checks| {
            many_rows(factory, checks, &KdaLayer::draw(shape, Gates::Mixed, 76, Origin::Bytes))
        }));
    }
    cases.push(Case::new("kda_mixer/random rule".into(), |factory: &mut F, checks| {
        chunks(factory, checks, &KdaLayer::draw(shape(128, 1, 128, 4), Gates::Mixed, 77, Origin::Rules))
    }));
    cases
}

fn all_but(used: &[u32]) -> Vec<u32> {
    (0..SLOTS).filter(|slot| !used.contains(slot)).collect()
}

/// Each length in one step from an empty state.
fn lengths<F: Factory>(factory: &mut F, checks: &mut Checks, model: &KdaLayer) -> Result<()> {
    let mut bench = KdaBench::open(factory, model)?;
    let width = model.shape.hidden;
    let x = model.inputs(&mut Draw::new(1), 200, bench.harness.activation);
    let (mut state, mut expected) = (KdaState::empty(&model.shape), Vec::new());
    for &length in checks.sizes(&LENGTHS, &[1, 200]) {
        // Causality: the reference's first tokens are the same for every length.
        let done = expected.len();
        expected.extend(model.run(&mut state, &x[done..length * width]));
        bench.start_empty(&[7])?;
        let found = bench.step(&[KdaRow { read: 7, write: 7, position: 0, x: &x[..length * width] }])?;
        let what = format!("{length} tokens");
        checks.close(&what, Quantity::KdaOutput, width, &found, &expected);
        bench.check_state(checks, &what, 7, &state)?;
    }
    bench.check_poison(checks, &all_but(&[7]))
}

/// A sequence in random chunks, its state carried in its slot.
fn chunks<F: Factory>(factory: &mut F, checks: &mut Checks, model: &KdaLayer) -> Result<()> {
    let mut bench = KdaBench::open(factory, model)?;
    let width = model.shape.hidden;
    for (seed, length) in [(1, 17), (2, 65), (3, 129), (4, 200), (5, 200)] {
        let mut draw = Draw::new(seed);
        let x = model.inputs(&mut draw, length, bench.harness.activation);
        let mut state = KdaState::empty(&model.shape);
        let expected = model.run(&mut state, &x);
        bench.start_empty(&[3])?;
        let mut found = Vec::new();
        let sizes = draw.chunks(length);
        for &size in &sizes {
            let position = found.len() / width;
            let x = &x[position * width..(position + size) * width];
            found.extend(bench.step(&[KdaRow { read: 3, write: 3, position, x }])?);
        }
        let what = format!("{length} tokens as {sizes:?}");
        checks.close(&what, Quantity::KdaOutput, width, &found, &expected);
        bench.check_state(checks, &what, 3, &state)?;
    }
    bench.check_poison(checks, &all_but(&[3]))
}

/// Some tokens after a history that left a state behind; single tokens shift the tails bit by bit.
fn prior_state<F: Factory>(factory: &mut F, checks: &mut Checks, model: &KdaLayer) -> Result<()> {
    let mut bench = KdaBench::open(factory, model)?;
    let width = model.shape.hidden;
    let mut draw = Draw::new(6);
    for length in [1, 2, 3, 16, 65] {
        let mut state = KdaState::drawn(&model.shape, &mut draw, bench.harness.activation);
        let x = model.inputs(&mut draw, length, bench.harness.activation);
        bench.import(0, &state)?;
        let before = bench.export(0)?;
        let expected = model.run(&mut state, &x);
        let found = bench.step(&[KdaRow { read: 0, write: 0, position: 1001, x: &x }])?;
        let what = format!("{length} tokens after a drawn state");
        checks.close(&what, Quantity::KdaOutput, width, &found, &expected);
        bench.check_state(checks, &what, 0, &state)?;
        if length == 1 {
            let after = bench.export(0)?;
            for ((kind, before), after) in KINDS.into_iter().zip(before).zip(after).skip(1) {
                let element = bench.dtype(kind).bytes();
                let run = (model.shape.conv - 1) * element;
                let kept = |bytes: Vec<u8>, from: usize, to: usize| -> Vec<u8> {
                    bytes.chunks_exact(run).flat_map(|tail| tail[from..to].to_vec()).collect()
                };
                let (shifted, old) = (kept(after, 0, run - element), kept(before, element, run));
                checks.equal(&format!("older inputs of {kind:?}"), &shifted, &old);
            }
        }
    }
    bench.check_poison(checks, &all_but(&[0]))
}

/// Decode rows and prefill chunks of several sequences in one step: each as if alone.
fn batch<F: Factory>(factory: &mut F, checks: &mut Checks, model: &KdaLayer) -> Result<()> {
    let mut bench = KdaBench::open(factory, model)?;
    let width = model.shape.hidden;
    let mut draw = Draw::new(8);
    let slots = [9_u32, 1, 4, 11, 6, 2, 8];
    let mut states: Vec<KdaState> = (0..slots.len())
        .map(|row| match row % 3 {
            0 => KdaState::empty(&model.shape),
            _ => KdaState::drawn(&model.shape, &mut draw, bench.harness.activation),
        })
        .collect();
    for (&slot, state) in slots.iter().zip(&states) {
        bench.import(slot, state)?;
    }
    for sizes in [[1, 64, 1, 3, 1, 65, 17], [2, 1, 129, 1, 1, 1, 16], [1, 1, 1, 1, 1, 1, 1]] {
        let inputs: Vec<Vec<f64>> =
            sizes.iter().map(|&size| model.inputs(&mut draw, size, bench.harness.activation)).collect();
        let order = draw.permutation(slots.len());
        let rows: Vec<KdaRow<'_>> = order
            .iter()
            .map(|&row| KdaRow { read: slots[row], write: slots[row], position: 500 + row, x: &inputs[row] })
            .collect();
        let found = bench.step(&rows)?;
        let mut done = 0;
        for &row in &order {
            let expected = model.run(&mut states[row], &inputs[row]);
            let what = format!("{} tokens in slot {} among {sizes:?}", sizes[row], slots[row]);
            checks.close(&what, Quantity::KdaOutput, width, &found[done..done + expected.len()], &expected);
            bench.check_state(checks, &what, slots[row], &states[row])?;
            done += expected.len();
        }
    }
    bench.check_poison(checks, &all_but(&slots))
}

/// Steps of a few, some and many rows of one token, which a backend may compute in different forms, and one row of more among many.
fn many_rows<F: Factory>(factory: &mut F, checks: &mut Checks, model: &KdaLayer) -> Result<()> {
    const ROWS: usize = 27;
    let mut bench = KdaBench::with_slots(factory, model, ROWS + 1)?;
    let width = model.shape.hidden;
    let mut draw = Draw::new(10);
    let slots: Vec<u32> = draw.permutation(ROWS).into_iter().map(|slot| slot as u32).collect();
    let mut states: Vec<KdaState> =
        slots.iter().map(|_| KdaState::drawn(&model.shape, &mut draw, bench.harness.activation)).collect();
    for (&slot, state) in slots.iter().zip(&states) {
        bench.import(slot, state)?;
    }
    let steps = [(ROWS, 1), (9, 1), (8, 1), (ROWS, 3), (ROWS, 1)];
    for &(count, last) in checks.sizes(&steps, &steps[..3]) {
        let size = |row| if row + 1 == count { last } else { 1 };
        let inputs: Vec<Vec<f64>> =
            (0..count).map(|row| model.inputs(&mut draw, size(row), bench.harness.activation)).collect();
        let rows: Vec<KdaRow<'_>> = slots
            .iter()
            .zip(&inputs)
            .map(|(&slot, x)| KdaRow { read: slot, write: slot, position: 70 + slot as usize, x })
            .collect();
        let found = bench.step(&rows)?;
        let expected: Vec<f64> = states.iter_mut().zip(&inputs).flat_map(|(state, x)| model.run(state, x)).collect();
        let what = format!("{count} rows, the last of {last} tokens");
        checks.close(&what, Quantity::KdaOutput, width, &found, &expected);
        for (&slot, state) in slots.iter().zip(&states).take(count) {
            bench.check_state(checks, &format!("slot {slot}, {what}"), slot, state)?;
        }
    }
    bench.check_poison(checks, &[ROWS as u32])
}

/// Rows that read one slot and write another: the slot read keeps its bits, and two rows may read the same one.
fn transaction<F: Factory>(factory: &mut F, checks: &mut Checks, model: &KdaLayer) -> Result<()> {
    let mut bench = KdaBench::open(factory, model)?;
    let width = model.shape.hidden;
    let mut draw = Draw::new(9);
    for &size in checks.sizes(&[1, 2, 17, 65], &[65]) {
        bench.harness.backend.poison_slots(&[2, 5, 10])?;
        let prior = KdaState::drawn(&model.shape, &mut draw, bench.harness.activation);
        bench.import(5, &prior)?;
        let before = bench.export(5)?;
        let inputs: Vec<Vec<f64>> = (0..2).map(|_| model.inputs(&mut draw, size, bench.harness.activation)).collect();
        let rows = [
            KdaRow { read: 5, write: 2, position: 40, x: &inputs[0] },
            KdaRow { read: 5, write: 10, position: 40, x: &inputs[1] },
        ];
        let found = bench.step(&rows)?;
        let halves = found.chunks(found.len() / 2);
        for ((slot, x), found) in [2, 10].into_iter().zip(&inputs).zip(halves) {
            let mut state = prior.clone();
            let expected = model.run(&mut state, x);
            let what = format!("{size} tokens from slot 5 to slot {slot}");
            checks.close(&what, Quantity::KdaOutput, width, found, &expected);
            bench.check_state(checks, &what, slot, &state)?;
        }
        for ((kind, before), after) in KINDS.into_iter().zip(before).zip(bench.export(5)?) {
            checks.equal(&format!("{kind:?} of the slot that {size} tokens only read"), &after, &before);
        }
    }
    bench.check_poison(checks, &all_but(&[2, 5, 10]))
}
