//! The pages that this replica keeps for sessions that others run, and answers to questions about them. Answering shares
//! no lock with the step loop: it reads an immutable table and pages that nobody writes any more. How questions arrive and
//! on which threads they are answered is the worker's business.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use perigee_backend::{Asked, LatentReader, PAGE_TOKENS};
use perigee_migration::attend::{AnswerStatus, HeadRange, SessionAnswer, SessionQuery};
use perigee_migration::{AnswerBatch, AttendError, AttendShape, QueryBatch};

use crate::cache::HomePages;

/// Times that a question is answered anew because its entry was replaced meanwhile.
const ATTEMPTS: usize = 3;

/// What answering needs to know of the model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AnswerModel {
    /// What questions may ask.
    pub shape: AttendShape,
    /// Softmax scale, (n + r)^-1/2, which queries have not had yet.
    pub scale: f32,
}

/// Pages kept for one session.
struct Entry {
    pages: HomePages,
    /// Highest epoch that may ask or has asked.
    epoch: AtomicU64,
    /// Whether it was asked about since the engine last looked.
    asked: AtomicBool,
    /// The run of a replica that has spoken for the session, and in which epoch.
    owner: Mutex<Option<(u64, Owner)>>,
}

/// A replica that runs a session, in one run of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Owner {
    /// Its name.
    pub replica: String,
    /// Which run of it.
    pub incarnation: String,
}

type Entries = HashMap<Arc<str>, Arc<Entry>>;

/// The sessions about which this replica answers. Clones are the same directory.
///
/// Who frees a page must have withdrawn or replaced the entries that name it before: an answer counts only if its entry is
/// still in the directory after the pages were read.
#[derive(Clone, Default)]
pub struct HomeDirectory {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    /// Replaced as a whole; held only to take or to change the reference.
    entries: RwLock<Arc<Entries>>,
    /// Held by who makes the next table.
    changing: Mutex<()>,
    /// Whether owners should take their latents.
    calls_back: AtomicBool,
}

/// Pages that were found for a question, and the entry that has to be still there when they have been read.
pub(crate) struct Held {
    entry: Arc<Entry>,
    /// In order of position.
    pub(crate) pages: Vec<u32>,
}

impl HomeDirectory {
    /// An empty directory.
    pub fn new() -> Self {
        Self::default()
    }

    /// Answers for a session from now on, in epochs from `first_epoch`. An earlier entry of it is replaced.
    pub fn publish(&self, session: &str, entry: HomePages, first_epoch: u64) {
        let (epoch, asked) = (AtomicU64::new(first_epoch), AtomicBool::new(false));
        let entry = Entry { pages: entry, epoch, asked, owner: Mutex::new(None) };
        self.change(|entries| {
            entries.insert(session.into(), Arc::new(entry));
        });
    }

    /// Answers no more for a session. When this returns, pages of its entry may be used for something else: an answer
    /// that is being computed over them will be found to be none.
    pub fn withdraw(&self, session: &str) {
        self.change(|entries| {
            entries.remove(session);
        });
    }

    /// Sessions that were asked about since the last call, with the highest epoch that ever asked: their owners live.
    pub fn asked(&self) -> Vec<(String, u64)> {
        let entries = self.entries();
        let asked = entries.iter().filter(|(_, entry)| entry.asked.swap(false, Ordering::Relaxed));
        asked.map(|(session, entry)| (session.to_string(), entry.epoch.load(Ordering::Relaxed))).collect()
    }

    /// Whether this replica wants the pages back that it keeps for others; owners hear of it within a second.
    pub fn call_back(&self, wants: bool) {
        self.inner.calls_back.store(wants, Ordering::Relaxed);
    }

    /// See [`Self::call_back`].
    pub fn calls_back(&self) -> bool {
        self.inner.calls_back.load(Ordering::Relaxed)
    }

    /// A session's owner needs what is kept for it, which renews its lease.
    ///
    /// # Errors
    /// [`AnswerStatus::Unknown`] where nothing is kept, [`AnswerStatus::Stale`] where a later owner spoke, or in this epoch
    /// another run of a replica.
    pub fn renew(&self, session: &str, epoch: u64, owner: &Owner) -> Result<(), AnswerStatus> {
        let entry = self.entries().get(session).cloned().ok_or(AnswerStatus::Unknown)?;
        let mut known = entry.owner.lock();
        if known.as_ref().is_some_and(|(of, who)| *of > epoch || (*of == epoch && who != owner)) {
            return Err(AnswerStatus::Stale);
        }
        self.find(session, epoch, &[])?;
        *known = Some((epoch, owner.clone()));
        Ok(())
    }

    /// One page of a session that its owner takes over, all MLA layers of it, as [`LatentReader::page`] gives them.
    ///
    /// # Errors
    /// Why there is none: the position is not kept here, for this epoch, or the device does not give it out
    /// ([`AnswerStatus::Busy`]).
    pub fn page(
        &self,
        reader: &dyn LatentReader,
        layers: u32,
        (session, epoch): (&str, u64),
        first: u64,
    ) -> Result<Vec<Vec<u8>>, AnswerStatus> {
        for _ in 0..ATTEMPTS {
            let held = self.find(session, epoch, std::slice::from_ref(&(first..first + PAGE_TOKENS as u64)))?;
            let &[page] = held.pages.as_slice() else { return Err(AnswerStatus::Missing) };
            let read: Result<Vec<_>, _> = (0..layers as usize).map(|layer| reader.page(layer, page)).collect();
            if !self.is_held(session, &held) {
                continue;
            }
            return read.map_err(|error| {
                tracing::warn!(session, %error, "a page could not be given out");
                AnswerStatus::Busy
            });
        }
        Err(AnswerStatus::Busy)
    }

    /// Number of sessions.
    pub fn len(&self) -> usize {
        self.entries().len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries().is_empty()
    }

    /// Answers an encoded [`QueryBatch`] with an encoded [`AnswerBatch`]: every session that it asks about with numbers or
    /// with the reason why not.
    ///
    /// # Errors
    /// The question cannot be read, or is for another model.
    pub fn answer(
        &self,
        reader: &dyn LatentReader,
        model: &AnswerModel,
        message: &[u8],
    ) -> Result<Vec<u8>, AttendError> {
        let question = QueryBatch::decode(message, &model.shape)?;
        let answer = AnswerBatch { heads: question.heads, sessions: self.answer_all(reader, model, &question) };
        answer.encode(&question)
    }

    /// All sessions of a question at once, and one by one those for which that came to nothing.
    fn answer_all(
        &self,
        reader: &dyn LatentReader,
        model: &AnswerModel,
        QueryBatch { heads, sessions, .. }: &QueryBatch,
    ) -> Vec<SessionAnswer> {
        let alone = |query: &SessionQuery| self.answer_one(reader, model, (heads, query));
        let found: Vec<_> =
            sessions.iter().map(|query| self.find(&query.session, query.epoch, &query.ranges)).collect();
        let queries: Vec<Vec<f32>> = sessions.iter().map(|query| query.values.to_f32()).collect();
        let held = found.iter().zip(&queries).filter_map(|(held, queries)| Some((held.as_ref().ok()?, queries)));
        let asked: Vec<Asked<'_>> = held.map(|(held, queries)| Asked { pages: &held.pages, queries }).collect();
        let (layer, count) = (heads.layer as usize, heads.heads as usize);
        let parts = match asked.len() {
            0 | 1 => return sessions.iter().map(alone).collect(),
            _ => reader.attend_all(layer, count, model.scale, heads.latent as usize, &asked),
        };
        // Whose question it was that failed is found by asking for each alone.
        let mut parts = parts.unwrap_or_default().into_iter();
        let answer = |(query, held): (&SessionQuery, &Result<Held, AnswerStatus>)| match held {
            Err(status) => SessionAnswer::refused(query, *status),
            Ok(held) => match parts.next() {
                Some(part) if self.is_held(&query.session, held) => answered(query, part),
                _ => alone(query),
            },
        };
        sessions.iter().zip(&found).map(answer).collect()
    }

    fn answer_one(
        &self,
        reader: &dyn LatentReader,
        model: &AnswerModel,
        (heads, query): (&HeadRange, &SessionQuery),
    ) -> SessionAnswer {
        let queries = query.values.to_f32();
        let (layer, count) = (heads.layer as usize, heads.heads as usize);
        for _ in 0..ATTEMPTS {
            let held = match self.find(&query.session, query.epoch, &query.ranges) {
                Ok(held) => held,
                Err(status) => return SessionAnswer::refused(query, status),
            };
            let part = reader.attend(layer, &held.pages, count, model.scale, heads.latent as usize, &queries);
            if !self.is_held(&query.session, &held) {
                continue;
            }
            match part {
                Ok(part) => return answered(query, part),
                Err(error) => {
                    tracing::warn!(session = query.session, %error, "a question could not be answered");
                    return SessionAnswer::refused(query, AnswerStatus::Busy);
                }
            }
        }
        SessionAnswer::refused(query, AnswerStatus::Busy)
    }

    /// The pages of some whole-page ranges of a session that asks in `epoch`, which is noted.
    pub(crate) fn find(&self, session: &str, epoch: u64, ranges: &[Range<u64>]) -> Result<Held, AnswerStatus> {
        let entry = self.entries().get(session).cloned().ok_or(AnswerStatus::Unknown)?;
        if entry.epoch.fetch_max(epoch, Ordering::Relaxed) > epoch {
            return Err(AnswerStatus::Stale);
        }
        entry.asked.store(true, Ordering::Relaxed);
        let pages = entry.pages_of(ranges).ok_or(AnswerStatus::Missing)?;
        Ok(Held { entry, pages })
    }

    /// Whether the pages were still kept when they were read.
    pub(crate) fn is_held(&self, session: &str, held: &Held) -> bool {
        self.entries().get(session).is_some_and(|entry| Arc::ptr_eq(entry, &held.entry))
    }

    fn entries(&self) -> Arc<Entries> {
        Arc::clone(&self.inner.entries.read())
    }

    fn change(&self, edit: impl FnOnce(&mut Entries)) {
        let _changing = self.inner.changing.lock();
        let mut next = Entries::clone(&self.entries());
        edit(&mut next);
        let next = Arc::new(next);
        *self.inner.entries.write() = next;
    }
}

/// A part that was computed over pages that were kept all the time, if it can be one.
fn answered(query: &SessionQuery, (output, lse): (Vec<f32>, Vec<f32>)) -> SessionAnswer {
    // Without an early end, so that many are looked at at once.
    if lse.iter().all(|value| value.is_finite()) && output.iter().fold(true, |all, value| all & value.is_finite()) {
        return SessionAnswer::answered(query, output, lse);
    }
    tracing::error!(session = query.session, "attention over kept pages is not finite");
    SessionAnswer::refused(query, AnswerStatus::Missing)
}

impl std::fmt::Debug for HomeDirectory {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("HomeDirectory").field("sessions", &self.len()).finish()
    }
}

impl Entry {
    /// Page numbers of all positions of the ranges; none where one is not here.
    fn pages_of(&self, ranges: &[Range<u64>]) -> Option<Vec<u32>> {
        let mut found = Vec::new();
        for range in ranges {
            let mut page = range.start / PAGE_TOKENS as u64;
            let end = range.end / PAGE_TOKENS as u64;
            while page < end {
                let run = self.pages.pages.partition_point(|(first, _)| *first <= page).checked_sub(1)?;
                let (first, pages) = self.pages.pages.get(run)?;
                let from = usize::try_from(page - first).ok()?;
                let rest = pages.get(from..).filter(|rest| !rest.is_empty())?;
                let taken = rest.len().min(usize::try_from(end - page).ok()?);
                found.extend_from_slice(rest.get(..taken)?);
                page += taken as u64;
            }
        }
        Some(found)
    }
}

#[cfg(test)]
mod tests {
    use perigee_backend::{BackendError, DType};
    use perigee_migration::attend::QueryValues;

    use super::*;

    const MODEL: AnswerModel =
        AnswerModel { shape: AttendShape { layers: 3, heads: 4, latent: 3, rope: 2, tokens: 8 }, scale: 0.5 };

    /// Answers with the number of the first page, after something else happened.
    struct Reader<F>(F);

    impl<F: Fn(&[u32]) -> f32 + Send + Sync> LatentReader for Reader<F> {
        fn attend(
            &self,
            layer: usize,
            pages: &[u32],
            heads: usize,
            scale: f32,
            latent: usize,
            queries: &[f32],
        ) -> perigee_backend::Result<(Vec<f32>, Vec<f32>)> {
            assert_eq!((layer, scale, latent, queries.len()), (1, 0.5, 3, 2 * heads * 5));
            if pages.contains(&13) {
                return Err(BackendError::Device("lost".into()));
            }
            let first = (self.0)(pages);
            Ok((vec![first; 2 * heads * latent], vec![first; 2 * heads]))
        }
    }

    fn plain() -> Reader<impl Fn(&[u32]) -> f32> {
        Reader(|pages: &[u32]| pages[0] as f32)
    }

    fn pages(runs: &[(u64, &[u32])]) -> HomePages {
        HomePages { pages: runs.iter().map(|(first, pages)| (*first, pages.to_vec())).collect() }
    }

    /// Asks about the first pages of one session with two tokens and two of four heads.
    fn ask(homes: &HomeDirectory, reader: &dyn LatentReader, epoch: u64, pages: u64) -> SessionAnswer {
        let heads = HeadRange { layer: 1, first_head: 2, heads: 2, latent: 3, rope: 2 };
        let ranges = std::iter::once(0..pages * 64).collect();
        let values = QueryValues::from_f32(&[0.25; 20], DType::Fp32);
        let query = SessionQuery { session: "s".into(), epoch, ranges, tokens: 2, values };
        let question = QueryBatch { heads, dtype: DType::Fp32, sessions: vec![query] };
        let message = question.encode(&MODEL.shape).unwrap();
        let answer = homes.answer(reader, &MODEL, &message).unwrap();
        AnswerBatch::decode(&answer, &question, &MODEL.shape).unwrap().sessions.remove(0)
    }

    #[test]
    fn pages_are_found_across_runs_and_gaps_are_missing() {
        let homes = HomeDirectory::new();
        homes.publish("s", pages(&[(0, &[7, 8]), (2, &[3]), (5, &[9, 1])]), 0);
        let find = |ranges: &[Range<u64>]| homes.find("s", 0, ranges).map(|held| held.pages);
        assert_eq!(find(std::slice::from_ref(&(0..192))), Ok(vec![7, 8, 3]));
        assert_eq!(find(&[64..128, 320..448]), Ok(vec![8, 9, 1]));
        assert_eq!(find(&[]), Ok(vec![]));
        for missing in [128..256, 192..320, 384..512, 0..u64::MAX - 63, 256..320] {
            assert_eq!(find(std::slice::from_ref(&missing)), Err(AnswerStatus::Missing), "{missing:?}");
        }
        assert_eq!(homes.find("t", 0, &[]).map(|held| held.pages), Err(AnswerStatus::Unknown));
    }

    #[test]
    fn epochs_only_rise() {
        let homes = HomeDirectory::new();
        homes.publish("s", pages(&[(0, &[4])]), 3);
        let status = |epoch| ask(&homes, &plain(), epoch, 1).status;
        assert_eq!(status(2), AnswerStatus::Stale);
        assert!(homes.asked().is_empty(), "a stale owner keeps nothing alive");
        assert_eq!(status(3), AnswerStatus::Answered);
        assert_eq!(status(8), AnswerStatus::Answered);
        assert_eq!(status(7), AnswerStatus::Stale);
        assert_eq!(homes.clone().asked(), [("s".to_owned(), 8)]);
        assert!(homes.asked().is_empty());
        homes.publish("s", pages(&[(0, &[4])]), 9);
        assert_eq!((status(8), status(9)), (AnswerStatus::Stale, AnswerStatus::Answered));
        assert_eq!((homes.len(), homes.is_empty()), (1, false));
    }

    #[test]
    fn a_lease_is_one_runs_in_one_epoch() {
        let homes = HomeDirectory::new();
        homes.publish("s", pages(&[(0, &[4])]), 2);
        let owner = |run: &str| Owner { replica: "b".into(), incarnation: run.into() };
        assert_eq!(homes.renew("t", 2, &owner("1")), Err(AnswerStatus::Unknown));
        assert_eq!(homes.renew("s", 1, &owner("1")), Err(AnswerStatus::Stale));
        assert!(homes.asked().is_empty());
        assert_eq!(homes.renew("s", 2, &owner("1")), Ok(()));
        assert_eq!(homes.asked(), [("s".to_owned(), 2)]);
        assert_eq!(
            homes.renew("s", 2, &owner("2")),
            Err(AnswerStatus::Stale),
            "another run knows nothing of this epoch"
        );
        assert!(homes.asked().is_empty());
        assert_eq!(homes.renew("s", 3, &owner("2")), Ok(()));
        assert_eq!(homes.renew("s", 2, &owner("1")), Err(AnswerStatus::Stale));
    }

    #[test]
    fn an_entry_that_went_while_its_pages_were_read_is_no_answer() {
        let homes = HomeDirectory::new();
        homes.publish("s", pages(&[(0, &[4])]), 1);
        let withdraws = Reader(|pages: &[u32]| {
            homes.withdraw("s");
            pages[0] as f32
        });
        let answer = ask(&homes, &withdraws, 1, 1);
        assert_eq!((answer.status, answer.output.len()), (AnswerStatus::Unknown, 0));
    }

    #[test]
    fn an_entry_that_was_replaced_is_read_again() {
        let homes = HomeDirectory::new();
        homes.publish("s", pages(&[(0, &[4])]), 1);
        let replaces = Reader(|read: &[u32]| {
            if read == [4] {
                homes.publish("s", pages(&[(0, &[6])]), 1);
            }
            read[0] as f32
        });
        let answer = ask(&homes, &replaces, 1, 1);
        assert_eq!((answer.status, answer.output[0]), (AnswerStatus::Answered, 6.0));
        let restless = Reader(|read: &[u32]| {
            homes.publish("s", pages(&[(0, &[read[0] + 1])]), 1);
            0.0
        });
        assert_eq!(ask(&homes, &restless, 1, 1).status, AnswerStatus::Busy);
    }

    #[test]
    fn damaged_pages_are_missing_and_a_failed_device_is_busy() {
        let homes = HomeDirectory::new();
        homes.publish("s", pages(&[(0, &[4, 13])]), 1);
        let damaged = Reader(|_: &[u32]| f32::NAN);
        assert_eq!(ask(&homes, &damaged, 1, 1).status, AnswerStatus::Missing);
        assert_eq!(ask(&homes, &plain(), 1, 2).status, AnswerStatus::Busy);
        assert_eq!(ask(&homes, &plain(), 1, 1).status, AnswerStatus::Answered);
    }

    #[test]
    fn sessions_of_a_question_are_answered_together_and_one_that_fails_fails_alone() {
        let homes = HomeDirectory::new();
        for (session, page) in [("a", 4), ("b", 5), ("c", 13), ("e", 6)] {
            homes.publish(session, pages(&[(0, &[page])]), 1);
        }
        let heads = HeadRange { layer: 1, first_head: 2, heads: 2, latent: 3, rope: 2 };
        let asked = |sessions: &[&str]| {
            let query = |session: &&str| SessionQuery {
                session: (*session).to_owned(),
                epoch: 1,
                ranges: std::iter::once(0..64).collect(),
                tokens: 2,
                values: QueryValues::from_f32(&[0.25; 20], DType::Fp32),
            };
            QueryBatch { heads, dtype: DType::Fp32, sessions: sessions.iter().map(query).collect() }
        };
        let answers = |question: &QueryBatch, reader: &dyn LatentReader| {
            let answer = homes.answer(reader, &MODEL, &question.encode(&MODEL.shape).unwrap()).unwrap();
            let sessions = AnswerBatch::decode(&answer, question, &MODEL.shape).unwrap().sessions;
            sessions.iter().map(|one| (one.status, one.output.first().copied())).collect::<Vec<_>>()
        };
        let (answered, none) = (AnswerStatus::Answered, None);
        let question = asked(&["b", "d", "a"]);
        assert_eq!(
            answers(&question, &plain()),
            [(answered, Some(5.0)), (AnswerStatus::Unknown, none), (answered, Some(4.0))]
        );
        let question = asked(&["a", "c", "b"]);
        assert_eq!(
            answers(&question, &plain()),
            [(answered, Some(4.0)), (AnswerStatus::Busy, none), (answered, Some(5.0))]
        );
        // One whose pages go while all are read is no answer, the others are.
        let withdraws = Reader(|pages: &[u32]| {
            homes.withdraw("e");
            pages[0] as f32
        });
        let question = asked(&["a", "e", "b"]);
        assert_eq!(
            answers(&question, &withdraws),
            [(answered, Some(4.0)), (AnswerStatus::Unknown, none), (answered, Some(5.0))]
        );
    }

    #[test]
    fn questions_for_another_model_are_errors() {
        let homes = HomeDirectory::new();
        let error = homes.answer(&plain(), &MODEL, b"PRGQ and then nothing of a question").unwrap_err();
        assert!(matches!(error, AttendError::Version { .. } | AttendError::Crc { .. }), "{error}");
    }
}
