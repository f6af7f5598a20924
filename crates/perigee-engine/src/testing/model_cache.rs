//! Slots and pages of the modelled executor: a slot is a hash spread over sixteen words, four heads of each state tensor,
//! and a page is the tokens of its positions. So both can be exported, cut by heads, damaged and summed up like real ones.

use std::ops::Range;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use perigee_backend::{BackendError, DType, LatentReader, PAGE_TOKENS, StatePart};
use perigee_migration::{Digest, Geometry, PageSlice, STATE_KINDS, StateSlice, Tensor, TensorDigests};

use super::mix;
use crate::executor::{ExecutorError, PageSpan};
use crate::homes::HomeDirectory;
use crate::remote::RemoteRow;
use crate::testing::RemoteAnswer;

/// What a page holds for each of its positions; none where nothing was written.
pub(super) type Page = [Option<u32>; PAGE_TOKENS];

/// A page to which nothing was written.
pub(super) const EMPTY_PAGE: Page = [None; PAGE_TOKENS];

/// Heads of every state tensor.
const HEADS: usize = 4;

/// One layer of each kind, one number for each head and position.
pub(super) const GEOMETRY: Geometry = Geometry {
    kda_layers: 1,
    kda_heads: HEADS as u32,
    kda_head_dim: 1,
    conv: 2,
    mla_layers: 1,
    latent_width: 1,
    recurrent_dtype: DType::Fp32,
    tail_dtype: DType::Fp32,
    latent_dtype: DType::Fp32,
};

/// The words of a slot, [kinds, heads].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Words([[u32; HEADS]; STATE_KINDS.len()]);

impl Words {
    /// A slot to which nothing of a session was written.
    const POISON: Self = Self([[u32::MAX; HEADS]; STATE_KINDS.len()]);

    /// Spreads a hash.
    pub(super) fn of(hash: u64) -> Self {
        let mut words = Self::POISON;
        for (place, word) in (0..).zip(words.0.iter_mut().flatten()) {
            *word = if place < 2 { (hash >> (32 * place)) as u32 } else { mix(hash, place) as u32 };
        }
        words
    }

    /// The hash again. Words that no hash has give one that depends on them all, so that damage shows in what is drawn.
    pub(super) fn hash(&self) -> u64 {
        let hash = u64::from(self.0[0][0]) | u64::from(self.0[0][1]) << 32;
        if Self::of(hash) == *self {
            return hash;
        }
        self.0.iter().flatten().fold(hash, |sum, word| mix(sum, u64::from(*word)))
    }

    /// All tensors as slices.
    pub(super) fn slices(&self) -> Vec<StateSlice> {
        let tensors = STATE_KINDS.iter().zip(&self.0).map(|(&kind, words)| {
            let part = StatePart { layer: 0, kind, first_head: 0, heads: HEADS as u32 };
            let bytes = words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
            StateSlice { part, digest: Digest::of_heads(&GEOMETRY, kind, 0, &bytes), bytes }
        });
        tensors.collect()
    }

    pub(super) fn digests(&self) -> TensorDigests {
        let mut digests = TensorDigests::new(&GEOMETRY);
        self.slices().iter().for_each(|slice| digests.add(slice.tensor(), slice.digest));
        digests
    }

    fn overwrite(&mut self, slice: &StateSlice) -> Result<(), ExecutorError> {
        let StateSlice { part, bytes, .. } = slice;
        let kind = STATE_KINDS.iter().position(|kind| *kind == part.kind).unwrap_or_default();
        let heads = part.first_head as usize..(part.first_head as usize).saturating_add(part.heads as usize);
        let words = self.0[kind].get_mut(heads).filter(|words| part.layer == 0 && words.len() * 4 == bytes.len());
        let words = words.ok_or_else(|| refused(format!("a slice of {part:?} with {} bytes", bytes.len())))?;
        words.iter_mut().zip(bytes.as_chunks().0).for_each(|(word, &bytes)| *word = u32::from_le_bytes(bytes));
        Ok(())
    }
}

/// Writes slices to a slot.
pub(super) fn overwrite(slot: &mut Option<Words>, slices: &[StateSlice]) -> Result<(), ExecutorError> {
    let words = slot.get_or_insert(Words::POISON);
    slices.iter().try_for_each(|slice| words.overwrite(slice))
}

/// The pages of a modelled replica, for it and for those who answer in its name.
#[derive(Debug, Clone)]
pub struct ModelPages(Arc<Mutex<Vec<Page>>>);

impl ModelPages {
    pub(super) fn new(count: usize) -> Self {
        Self(Arc::new(Mutex::new(vec![EMPTY_PAGE; count])))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Vec<Page>> {
        self.0.lock()
    }

    /// What a home says of some positions of a session that asks, by its directory and these pages.
    pub fn answer(&self, homes: &HomeDirectory, row: &RemoteRow, range: &Range<u64>) -> RemoteAnswer {
        let held = match homes.find(&row.session, row.epoch, std::slice::from_ref(range)) {
            Ok(held) => held,
            Err(status) => return RemoteAnswer::Refused(status),
        };
        let pages = self.lock();
        let tokens = held.pages.iter().filter_map(|page| pages.get(*page as usize)).flatten().copied();
        let tokens: Option<Vec<u32>> = tokens.collect();
        match tokens {
            _ if !homes.is_held(&row.session, &held) => RemoteAnswer::Refused(perigee_migration::AnswerStatus::Unknown),
            None => RemoteAnswer::Refused(perigee_migration::AnswerStatus::Missing),
            Some(tokens) => RemoteAnswer::Tokens(tokens),
        }
    }
}

/// Gives pages out; questions go by [`ModelPages::answer`].
impl LatentReader for ModelPages {
    fn attend(
        &self,
        _layer: usize,
        _pages: &[u32],
        _heads: usize,
        _scale: f32,
        _latent: usize,
        _queries: &[f32],
    ) -> perigee_backend::Result<(Vec<f32>, Vec<f32>)> {
        Err(BackendError::Unsupported("attention over modelled pages".into()))
    }

    fn page(&self, _layer: usize, number: u32) -> perigee_backend::Result<Vec<u8>> {
        let span = PageSpan { page: number, first: 0, positions: PAGE_TOKENS as u32 };
        let exported = export_page(&mut self.lock(), &span);
        exported.map(|slice| slice.bytes).map_err(|error| BackendError::Device(error.message))
    }
}

/// One page of a pool.
pub(super) fn page(pages: &mut [Page], page: u32) -> Result<&mut Page, ExecutorError> {
    pages.get_mut(page as usize).ok_or_else(|| refused(format!("there is no page {page}")))
}

/// The filled positions of a page.
pub(super) fn export_page(pages: &mut [Page], span: &PageSpan) -> Result<PageSlice, ExecutorError> {
    let held = page(pages, span.page)?.get(..span.positions as usize).unwrap_or_default();
    let tokens: Option<Vec<u32>> = held.iter().copied().collect();
    let unwritten = || refused(format!("page {} has positions that were never written", span.page));
    let bytes = tokens.ok_or_else(unwritten)?.iter().flat_map(|token| token.to_le_bytes()).collect();
    PageSlice::new(&GEOMETRY, 0, span.first, bytes).map_err(|error| refused(error.to_string()))
}

/// Writes a slice to the beginning of a page.
pub(super) fn import_page(pages: &mut [Page], number: u32, slice: &PageSlice) -> Result<(), ExecutorError> {
    let words = slice.bytes.as_chunks().0;
    let place = page(pages, number)?.get_mut(..words.len()).filter(|_| slice.tensor() == Tensor::Latents { layer: 0 });
    let place = place.ok_or_else(|| refused(format!("a slice of {} bytes fits no page", slice.bytes.len())))?;
    place.iter_mut().zip(words).for_each(|(place, &word)| *place = Some(u32::from_le_bytes(word)));
    Ok(())
}

pub(super) fn refused(message: String) -> ExecutorError {
    ExecutorError { rank: 0, message, fatal: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_comes_back_from_its_words_and_damage_shows_in_it() {
        let words = Words::of(0x0123_4567_89ab_cdef);
        assert_eq!(words.hash(), 0x0123_4567_89ab_cdef);
        let mut copy = None;
        let mut slices = words.slices();
        overwrite(&mut copy, &slices).unwrap();
        assert_eq!(copy, Some(words));
        for place in 0..16 {
            slices[place / 4].bytes[place % 4 * 4] ^= 1;
            overwrite(&mut copy, &slices).unwrap();
            let damaged = copy.unwrap();
            assert_ne!(damaged.hash(), words.hash(), "word {place}");
            assert_ne!(damaged.digests(), words.digests(), "word {place}");
            slices[place / 4].bytes[place % 4 * 4] ^= 1;
        }
    }

    #[test]
    fn slices_that_fit_nowhere_are_refused() {
        let mut slice = Words::of(1).slices().remove(0);
        slice.part.first_head = 1;
        assert!(overwrite(&mut None, &[slice]).is_err());
        let mut pages = vec![EMPTY_PAGE];
        let span = PageSpan { page: 0, first: 64, positions: 2 };
        assert!(export_page(&mut pages, &span).is_err(), "never written");
        pages[0][..2].copy_from_slice(&[Some(5), Some(6)]);
        let slice = export_page(&mut pages, &span).unwrap();
        assert_eq!((slice.first, slice.positions), (64, 2));
        let mut others = vec![EMPTY_PAGE];
        import_page(&mut others, 0, &slice).unwrap();
        assert_eq!(others, pages);
        assert!(import_page(&mut others, 1, &slice).is_err());
    }
}
