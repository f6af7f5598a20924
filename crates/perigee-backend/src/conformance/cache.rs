//! Cases of the caches as such: slots cleared, poisoned, copied, moved in head ranges; pages copied and moved; everything
//! out of range refused. What an operation does not name keeps its bits.

use crate::error::Result;
use crate::ops::{Backend, PagePart, PageWrite, StateKind, StatePart};
use crate::shapes::{KdaShape, MlaShape, PAGE_TOKENS};

use super::check::Checks;
use super::draw::{Draw, Origin, decode};
use super::kda_bench::{KINDS, KdaBench, SLOTS};
use super::mla_bench::{LAYERS, MlaBench, MlaRow, PAGES};
use super::reference::kda::{Gates, KdaLayer, KdaState};
use super::reference::mla::MlaLayer;
use super::{Case, Factory};

const KDA: KdaShape = KdaShape { hidden: 64, heads: 4, head_dim: 32, conv: 4, eps: 1e-5 };
const KDA_PUBLISHED: KdaShape = KdaShape { hidden: 128, heads: 3, head_dim: 128, conv: 4, eps: 1e-5 };
const MLA: MlaShape =
    MlaShape { hidden: 64, heads: 2, nope: 32, rope: 16, value: 32, latent: 64, query_rank: None, eps: 1e-6 };
const MLA_PUBLISHED: MlaShape =
    MlaShape { hidden: 128, heads: 1, nope: 128, rope: 64, value: 128, latent: 512, query_rank: None, eps: 1e-6 };

pub(super) fn cases<F: Factory>() -> Vec<Case<F>> {
    let mut cases = Vec::new();
    for shape in [KDA, KDA_PUBLISHED] {
        for (what, body) in [
            ("clear, poison and copy", slots::<F> as fn(&mut F, &mut Checks, &KdaLayer) -> Result<()>),
            ("head ranges", head_ranges::<F>),
            ("sums", sums::<F>),
            ("out of range", slots_out_of_range::<F>),
        ] {
            let name = format!("state_slots/{what}/{}x{}", shape.heads, shape.head_dim);
            cases.push(Case::new(name, move |factory: &mut F, checks| {
                body(factory, checks, &KdaLayer::draw(shape, Gates::Mixed, 81, Origin::Bytes))
            }));
        }
    }
    for shape in [MLA, MLA_PUBLISHED] {
        for (what, body) in [
            ("copy", copied_pages::<F> as fn(&mut F, &mut Checks, &MlaLayer) -> Result<()>),
            ("export and import", moved_pages::<F>),
            ("out of range", pages_out_of_range::<F>),
        ] {
            cases.push(Case::new(
                format!("latent_pages/{what}/latent {}", shape.latent),
                move |factory: &mut F, checks| body(factory, checks, &MlaLayer::draw(shape, 82, Origin::Bytes)),
            ));
        }
    }
    cases
}

/// The bytes of all four tensors of both layers of a slot.
fn whole_slot<B: Backend>(bench: &mut KdaBench<'_, B>, slot: u32) -> Result<Vec<Vec<u8>>> {
    let parts: Vec<StatePart> = (0..2).flat_map(|layer| KINDS.map(|kind| bench.part(layer, kind))).collect();
    parts.iter().map(|part| bench.harness.backend.export_state(slot, part)).collect()
}

fn slots<F: Factory>(factory: &mut F, checks: &mut Checks, model: &KdaLayer) -> Result<()> {
    let mut bench = KdaBench::open(factory, model)?;
    bench.check_poison(checks, &(0..SLOTS).collect::<Vec<_>>())?;
    bench.harness.backend.clear_slots(&[1, 4, SLOTS - 1])?;
    for slot in [1, 4, SLOTS - 1] {
        let zero = whole_slot(&mut bench, slot)?.concat().iter().all(|&byte| byte == 0);
        checks.holds(&format!("cleared slot {slot}"), zero, || "is not all zero".into());
    }
    let state = KdaState::drawn(&model.shape, &mut Draw::new(1), bench.harness.activation);
    bench.import(4, &state)?;
    let source = whole_slot(&mut bench, 4)?;
    bench.harness.backend.copy_slot(4, 6)?;
    checks.equal("the copy of a slot", &whole_slot(&mut bench, 6)?, &source);
    checks.equal("a slot that was copied", &whole_slot(&mut bench, 4)?, &source);

    bench.harness.backend.poison_slots(&[4])?;
    checks.equal("a copy after its source was poisoned", &whole_slot(&mut bench, 6)?, &source);
    for (number, kind) in KINDS.into_iter().chain(KINDS).enumerate() {
        let found = decode(&whole_slot(&mut bench, 4)?[number], bench.dtype(kind));
        checks.poisoned(&format!("{kind:?} of a poisoned slot"), &found);
    }
    bench.harness.backend.clear_slots(&[6])?;
    let neighbours = [whole_slot(&mut bench, 1)?, whole_slot(&mut bench, SLOTS - 1)?].concat().concat();
    checks.holds("slots beside", neighbours.iter().all(|&byte| byte == 0), || "have changed".into());
    for slot in [0, 2, 3, 5, 7] {
        let bytes = whole_slot(&mut bench, slot)?;
        checks.poisoned(&format!("recurrent state of slot {slot}"), &decode(&bytes[0], bench.dtype(KINDS[0])));
    }
    Ok(())
}

/// States move between tensor-parallel degrees by head ranges: a range is exactly those heads of the whole, and importing
/// one touches no other head, tensor, layer or slot.
fn head_ranges<F: Factory>(factory: &mut F, checks: &mut Checks, model: &KdaLayer) -> Result<()> {
    let mut bench = KdaBench::open(factory, model)?;
    let heads = model.shape.heads as u32;
    let mut draw = Draw::new(2);
    let (from, to) = (3, 8);
    for slot in [from, to] {
        bench.harness.backend.clear_slots(&[slot])?;
        let state = KdaState::drawn(&model.shape, &mut draw, bench.harness.activation);
        bench.import(slot, &state)?;
    }
    let whole = bench.export(from)?;
    let other_layer = whole_slot(&mut bench, to)?[..4].to_vec();
    for (number, kind) in KINDS.into_iter().enumerate() {
        let head_bytes = bench.head_elements(kind) * bench.dtype(kind).bytes();
        checks.equal(&format!("size of {kind:?}"), &[whole[number].len()], &[head_bytes * heads as usize]);
        let of = |first: u32, count: u32| first as usize * head_bytes..(first + count) as usize * head_bytes;
        for (first, count) in [(0, 1), (heads - 1, 1), (1, 2), (0, heads - 1), (0, heads)] {
            let part = StatePart { layer: 1, kind, first_head: first, heads: count };
            let what = format!("{kind:?} of heads {first}..{}", first + count);
            let range = bench.harness.backend.export_state(from, &part)?;
            checks.equal(&format!("exported {what}"), &range, &whole[number][of(first, count)]);

            let mut expected = bench.export(to)?;
            expected[number][of(first, count)].copy_from_slice(&range);
            bench.harness.backend.import_state(to, &part, &range)?;
            checks.equal(&format!("slot after importing {what}"), &bench.export(to)?, &expected);
        }
    }
    checks.equal("the whole after all ranges", &bench.export(to)?, &whole);
    checks.equal("the source", &bench.export(from)?, &whole);
    checks.equal("the other layer", &whole_slot(&mut bench, to)?[..4], &other_layer);
    Ok(())
}

/// What both sides of a move compare: every element by its number in the whole model.
fn sums<F: Factory>(factory: &mut F, checks: &mut Checks, model: &KdaLayer) -> Result<()> {
    let mut bench = KdaBench::open(factory, model)?;
    let mut draw = Draw::new(3);
    for (slot, first_head) in [(2, 0), (SLOTS - 1, 7), (2, 1 << 14)] {
        bench.harness.backend.clear_slots(&[slot])?;
        let state = KdaState::drawn(&model.shape, &mut draw, bench.harness.activation);
        bench.import(slot, &state)?;
        let found = bench.harness.backend.state_sums(slot, first_head)?;
        let tensors = whole_slot(&mut bench, slot)?;
        let expected: Vec<u64> = tensors
            .iter()
            .zip(KINDS.into_iter().cycle())
            .map(|(bytes, kind)| {
                let first = u64::from(first_head) * bench.head_elements(kind) as u64;
                weighted(bytes, bench.dtype(kind).bytes(), first)
            })
            .collect();
        checks.equal(&format!("sums of slot {slot}, heads from {first_head} on"), &found, &expected);
    }
    checks.refused("sums of a slot that is not there", bench.harness.backend.state_sums(SLOTS, 0));
    Ok(())
}

fn weighted(bytes: &[u8], size: usize, first: u64) -> u64 {
    let bits =
        bytes.chunks_exact(size).map(|chunk| chunk.iter().rev().fold(0, |bits, &byte| bits << 8 | u64::from(byte)));
    (first..).zip(bits).fold(0, |sum: u64, (index, bits)| sum.wrapping_add((index + 1).wrapping_mul(bits)))
}

fn slots_out_of_range<F: Factory>(factory: &mut F, checks: &mut Checks, model: &KdaLayer) -> Result<()> {
    let mut bench = KdaBench::open(factory, model)?;
    let heads = model.shape.heads as u32;
    bench.harness.backend.clear_slots(&[0])?;
    let good = bench.part(0, StateKind::Recurrent);
    let bytes = bench.harness.backend.export_state(0, &good)?;
    let backend = &mut bench.harness.backend;
    for (what, slot, part) in [
        ("slot", SLOTS, good),
        ("layer", 0, StatePart { layer: 2, ..good }),
        ("head range past the end", 0, StatePart { first_head: 1, ..good }),
        ("first head", 0, StatePart { first_head: heads, heads: 1, ..good }),
        ("head range that wraps", 0, StatePart { first_head: u32::MAX, heads: 2, ..good }),
    ] {
        checks.refused(&format!("export of a {what}"), backend.export_state(slot, &part));
        let size = bytes.len() / heads as usize * part.heads as usize;
        checks.refused(&format!("import of a {what}"), backend.import_state(slot, &part, &vec![0; size]));
    }
    checks.refused("import of too few bytes", backend.import_state(0, &good, &bytes[4..]));
    checks.refused("import of too many bytes", backend.import_state(0, &good, &[&bytes[..], &[0; 4]].concat()));
    checks.refused("clearing a slot that is not there", backend.clear_slots(&[0, SLOTS]));
    checks.refused("poisoning a slot that is not there", backend.poison_slots(&[SLOTS]));
    checks.refused("copying from a slot that is not there", backend.copy_slot(SLOTS, 0));
    checks.refused("copying to a slot that is not there", backend.copy_slot(0, SLOTS));
    let after = backend.export_state(0, &good)?;
    checks.equal("the state after the refusals", &after, &bytes);
    Ok(())
}

/// A fork copies the partial last page: both sequences then go on in their own.
fn copied_pages<F: Factory>(factory: &mut F, checks: &mut Checks, model: &MlaLayer) -> Result<()> {
    let mut bench = MlaBench::open(factory, model)?;
    let mut draw = Draw::new(3);
    let width = model.shape.hidden;
    let first = bench.sequence(&mut draw, 90);
    // The same 80 tokens, then others.
    let mut x = first.x[..80 * width].to_vec();
    x.extend(draw.normals(10 * width, 1.0, bench.harness.activation));
    let second = model.sequence(x);
    let segments = bench.place(&[0, 90])?;
    bench.fill(&[MlaRow { sequence: &first, segments: &segments, tokens: 0..80 }])?;
    let mut fork = segments.clone();
    let spare = bench.place(&[64, 90])?;
    fork[0].pages[1] = spare[0].pages[0];
    bench.harness.backend.copy_page(segments[0].pages[1], fork[0].pages[1])?;
    let rows = [
        MlaRow { sequence: &first, segments: &segments, tokens: 80..90 },
        MlaRow { sequence: &second, segments: &fork, tokens: 80..90 },
    ];
    bench.step(checks, "10 tokens of a sequence and its fork", &rows)?;
    bench.check_pages(checks, &first, &segments, 90)?;
    bench.check_pages(checks, &second, &fork, 90)?;

    // In every layer.
    let (from, to) = (segments[0].pages[0], spare[0].pages[0]);
    let bytes = bench.harness.backend.export_page(from, 1)?;
    bench.harness.backend.import_page(from, 0, &bytes)?;
    bench.harness.backend.copy_page(from, to)?;
    for layer in 0..LAYERS as u32 {
        let copy = bench.harness.backend.export_page(to, layer)?;
        checks.equal(&format!("layer {layer} of the copy"), &copy, &bytes);
    }
    bench.harness.backend.poison_pages(&[from])?;
    for layer in 0..LAYERS {
        let found = bench.page(from, layer)?;
        checks.poisoned(&format!("layer {layer} of a poisoned page"), &found);
        let copy = bench.harness.backend.export_page(to, layer as u32)?;
        checks.equal(&format!("layer {layer} of the copy after poison"), &copy, &bytes);
    }
    Ok(())
}

/// Pages exported from one place and imported in another serve attention there; of the last, only the part in use moves.
fn moved_pages<F: Factory>(factory: &mut F, checks: &mut Checks, model: &MlaLayer) -> Result<()> {
    let mut bench = MlaBench::open(factory, model)?;
    let sequence = bench.sequence(&mut Draw::new(4), 141);
    let source = bench.place(&[0, 141])?;
    let target = bench.place(&[0, 141])?;
    bench.fill(&[MlaRow { sequence: &sequence, segments: &source, tokens: 0..138 }])?;
    for (number, (&from, &to)) in source[0].pages.iter().zip(&target[0].pages).enumerate() {
        let bytes = bench.harness.backend.export_page(from, 1)?;
        let element = bench.page_dtype(&bytes).bytes();
        checks.equal("size of a page", &[bytes.len()], &[PAGE_TOKENS * model.shape.cache_width() * element]);
        let used = (138 - number * PAGE_TOKENS).min(PAGE_TOKENS);
        let part = &bytes[..used * model.shape.cache_width() * element];
        bench.harness.backend.import_page(to, 1, part)?;
        let copy = bench.harness.backend.export_page(to, 1)?;
        checks.equal("positions moved", &copy[..part.len()], part);
    }
    bench.check_pages(checks, &sequence, &target, 138)?;
    together(checks, &mut bench.harness.backend, &source[0].pages, &target[0].pages)?;
    bench.check_pages(checks, &sequence, &target, 138)?;
    bench.harness.backend.poison_pages(&source[0].pages)?;
    bench.step(checks, "2 tokens", &[MlaRow { sequence: &sequence, segments: &target, tokens: 138..140 }])?;
    bench.step(checks, "1 token", &[MlaRow { sequence: &sequence, segments: &target, tokens: 140..141 }])?;
    bench.check_pages(checks, &sequence, &target, 141)
}

/// Pages that cross in one call do as one by one, more of them than a device may take at once, and parts of them.
fn together<B: Backend>(checks: &mut Checks, backend: &mut B, from: &[u32], to: &[u32]) -> Result<()> {
    let lengths = [PAGE_TOKENS as u32, 1, 0, 17, PAGE_TOKENS as u32 - 1];
    let parts: Vec<PagePart> = (0..90)
        .map(|index| PagePart {
            page: from[index % from.len()],
            layer: 1 - (index / 7 % LAYERS) as u32,
            positions: lengths[index % lengths.len()],
        })
        .collect();
    let exported = backend.export_pages(&parts)?;
    checks.equal("parts of pages", &[exported.len()], &[parts.len()]);
    for (part, bytes) in parts.iter().zip(&exported) {
        let whole = backend.export_page(part.page, part.layer)?;
        let used = whole.len() / PAGE_TOKENS * part.positions as usize;
        checks.equal(&format!("{part:?}"), bytes, &whole[..used]);
    }

    // The last write of a place holds.
    let pages: Vec<Vec<u8>> = from.iter().map(|&page| backend.export_page(page, 1)).collect::<Result<_>>()?;
    backend.poison_pages(to)?;
    let wrong = to.iter().map(|&page| PageWrite { page, layer: 1, bytes: &pages[0] });
    let writes: Vec<PageWrite<'_>> = wrong
        .cycle()
        .take(40)
        .chain(to.iter().zip(&pages).map(|(&page, bytes)| PageWrite { page, layer: 1, bytes }))
        .collect();
    backend.import_pages(&writes)?;
    for (&page, bytes) in to.iter().zip(&pages) {
        checks.equal(&format!("page {page}, written with others"), &backend.export_page(page, 1)?, bytes);
    }
    Ok(())
}

fn pages_out_of_range<F: Factory>(factory: &mut F, checks: &mut Checks, model: &MlaLayer) -> Result<()> {
    let mut bench = MlaBench::open(factory, model)?;
    let (none, no_layer) = (PAGES as u32, LAYERS as u32);
    let backend = &mut bench.harness.backend;
    let bytes = backend.export_page(0, 0)?;
    checks.refused("export of a page that is not there", backend.export_page(none, 0));
    checks.refused("export of a layer that is not there", backend.export_page(0, no_layer));
    let more = PagePart { page: 0, layer: 0, positions: PAGE_TOKENS as u32 + 1 };
    checks.refused("export of more than a page", backend.export_pages(&[more]));
    checks.refused("import of a page that is not there", backend.import_page(none, 0, &bytes));
    checks.refused("import of a layer that is not there", backend.import_page(0, no_layer, &bytes));
    checks.refused("import of more than a page", backend.import_page(0, 0, &[&bytes[..], &bytes[..]].concat()));
    checks.refused("import of half a position", backend.import_page(0, 0, &bytes[..bytes.len() / PAGE_TOKENS / 2]));
    checks.refused("copy of a page that is not there", backend.copy_page(none, 0));
    checks.refused("copy to a page that is not there", backend.copy_page(0, none));
    checks.refused("poison of a page that is not there", backend.poison_pages(&[none]));
    let found = bench.page(0, 0)?;
    checks.poisoned("the page after the refusals", &found);
    Ok(())
}
