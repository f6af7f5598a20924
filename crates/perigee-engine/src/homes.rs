//! The pages that this replica keeps for sessions that others run, and answers to questions about them. Answering shares
//! no lock with the step loop: it reads an immutable table and pages that nobody writes any more. How questions arrive and
//! on which threads they are answered is the worker's business.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use perigee_backend::{LatentReader, PAGE_TOKENS};
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
        let entry = Entry { pages: entry, epoch: AtomicU64::new(first_epoch), asked: AtomicBool::new(false) };
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
        let sessions = question.sessions.iter().map(|query| self.answer_one(reader, model, (&question.heads, query)));
        let answer = AnswerBatch { heads: question.heads, sessions: sessions.collect() };
        answer.encode(&question)
    }

    fn answer_one(
        &self,
        reader: &dyn LatentReader,
        model: &AnswerModel,
        (heads, query): (&HeadRange, &SessionQuery),
    ) -> SessionAnswer {
        let queries = query.values.to_f32();
        for _ in 0..ATTEMPTS {
            let held = match self.find(&query.session, query.epoch, &query.ranges) {
                Ok(held) => held,
                Err(status) => return SessionAnswer::refused(query, status),
            };
            let (layer, count) = (heads.layer as usize, heads.heads as usize);
            let part = reader.attend(layer, &held.pages, count, model.scale, heads.latent as usize, &queries);
            if !self.is_held(&query.session, &held) {
                continue;
            }
            match part {
                Ok((output, lse)) if output.iter().chain(&lse).all(|value| value.is_finite()) => {
                    return SessionAnswer::answered(query, output, lse);
                }
                Ok(_) => {
                    tracing::error!(session = query.session, "attention over kept pages is not finite");
                    return SessionAnswer::refused(query, AnswerStatus::Missing);
                }
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
