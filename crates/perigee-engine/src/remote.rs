//! A step's rows whose older keys are at other replicas: what the plan says of them, who carries the questions, and what
//! asking cost. Connections are the transport's business ([`AttentionClient`]), and what becomes of a row without an
//! answer is the engine's.

mod step;

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use perigee_backend::{BackendError, PAGE_TOKENS, Row, StepBatch};
use perigee_migration::AttendShape;
use perigee_migration::attend::AnswerStatus;
use serde::{Deserialize, Serialize};

pub(crate) use self::step::{RemoteHooks, RemoteStep, Seat};

/// Remote rows of a step and the homes that they ask.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemotePlan {
    /// Homes, each once.
    pub homes: Vec<RemoteHome>,
    /// The rows, ascending; none in a step that asks nobody.
    pub rows: Vec<RemoteRow>,
    /// Longest wait for answers in the whole step, in milliseconds.
    pub patience_ms: u32,
}

/// A replica that holds latents of others' sessions, in one run of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RemoteHome {
    /// Its name.
    pub replica: String,
    /// Which run of it.
    pub incarnation: String,
    /// Its internal gRPC address, host:port.
    pub endpoint: String,
}

/// A row of the step's batch with keys elsewhere. It reads one slot and writes another, so that a step without its
/// answers can be forgotten.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteRow {
    /// Index into `batch.rows`.
    pub row: u32,
    /// The session, as its homes know it.
    pub session: String,
    /// Its epoch.
    pub epoch: u64,
    /// What is where, each home once; together with the row's segments every position before its end, each once.
    pub parts: Vec<RemoteRanges>,
}

/// Positions of a session at one home.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteRanges {
    /// Index into [`RemotePlan::homes`].
    pub home: u32,
    /// Whole pages, ascending and disjoint.
    pub ranges: Vec<Range<u64>>,
}

/// Carries encoded questions to homes and answers back; every rank's process has one. It neither reads nor makes them.
pub trait AttentionClient: Send {
    /// Sends a question on its way. Never blocks.
    fn ask(&mut self, home: &RemoteHome, message: Vec<u8>);
    /// Answers to all questions since the last call, in the order in which they were asked; none for one that is missing.
    /// Returns when all are there or known to have failed, at `until` at the latest.
    fn collect(&mut self, until: Instant) -> Vec<Option<Vec<u8>>>;
    /// Whether asking this home would only cost time: an earlier question is still unanswered, or there is no connection.
    fn is_overdue(&self, home: &RemoteHome) -> bool;
}

/// What the remote rows of a step cost. Ranks count by themselves and are added up; of the waits the longest counts,
/// because they wait side by side.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteCounts {
    /// Bytes of queries, message headers apart.
    pub query_bytes: u64,
    /// Bytes of outputs and log-sum-exps, message headers apart.
    pub answer_bytes: u64,
    /// Tokens of remote rows, each counted once, on however many ranks and whether or not it was answered.
    pub tokens: u64,
    /// Time in which a rank did nothing but wait for answers.
    pub wait: Duration,
}

/// What became of a step on one rank, or on all of them together.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepReport {
    /// Rows that missed an answer, ascending indices into the batch's rows.
    pub faulty: Vec<u32>,
    /// Faulty rows whose home said why, ascending, each once.
    pub refusals: Vec<Refusal>,
    /// What asking cost.
    pub counts: RemoteCounts,
}

/// A row to which a home did not give numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Index into the batch's rows.
    pub row: u32,
    /// What the home said.
    #[serde(with = "Status")]
    pub status: AnswerStatus,
}

/// [`AnswerStatus`] between ranks.
#[derive(Serialize, Deserialize)]
#[serde(remote = "AnswerStatus")]
enum Status {
    Answered,
    Unknown,
    Stale,
    Missing,
    Busy,
}

/// A rank's way to ask.
pub(crate) struct RemoteAttention {
    pub(crate) client: Box<dyn AttentionClient>,
    pub(crate) shape: AttendShape,
}

impl StepReport {
    /// Adds another rank's: a row that is faulty on one is faulty.
    pub(crate) fn join(&mut self, other: Self) {
        self.faulty.extend(other.faulty);
        self.faulty.sort_unstable();
        self.faulty.dedup();
        let mut refusals: BTreeMap<u32, Refusal> = other.refusals.into_iter().map(|found| (found.row, found)).collect();
        refusals.extend(self.refusals.iter().map(|found| (found.row, *found)));
        self.refusals = refusals.into_values().collect();
        let (mine, theirs) = (&mut self.counts, other.counts);
        mine.query_bytes += theirs.query_bytes;
        mine.answer_bytes += theirs.answer_bytes;
        mine.tokens = mine.tokens.max(theirs.tokens);
        mine.wait = mine.wait.max(theirs.wait);
    }
}

impl RemotePlan {
    /// Checks everything that a step relies on: rows and homes that exist, slots that make a row a transaction, and
    /// positions that are each in one place.
    ///
    /// # Errors
    /// [`BackendError::Batch`] names the row.
    pub fn validate(&self, batch: &StepBatch) -> Result<(), BackendError> {
        if self.rows.windows(2).any(|pair| pair[0].row >= pair[1].row) {
            return Err(BackendError::Batch("remote rows must ascend".into()));
        }
        self.rows.iter().try_for_each(|remote| {
            let row = batch.rows.get(remote.row as usize).ok_or(BackendError::Range {
                what: "row with remote keys",
                index: remote.row.into(),
                limit: batch.rows.len() as u64,
            })?;
            self.check(remote, row).map_err(|what| BackendError::Batch(format!("remote row {}: {what}", remote.row)))
        })
    }

    fn check(&self, remote: &RemoteRow, row: &Row) -> Result<(), String> {
        if row.read_slot == row.write_slot {
            return Err(format!("it writes the slot {} that it reads", row.read_slot));
        }
        let mut homes: Vec<u32> = remote.parts.iter().map(|part| part.home).collect();
        homes.sort_unstable();
        let is_repeated = homes.windows(2).any(|pair| pair[0] == pair[1]);
        if homes.is_empty() || is_repeated || homes.last().is_some_and(|&last| last as usize >= self.homes.len()) {
            return Err(format!("its homes are {homes:?} of {}", self.homes.len()));
        }
        let mut places: Vec<Range<u64>> = row.segments.iter().map(|segment| segment.start..segment.end).collect();
        for range in remote.parts.iter().flat_map(|part| &part.ranges) {
            let is_whole = |position: u64| position.is_multiple_of(PAGE_TOKENS as u64);
            if range.start >= range.end || range.end > row.position || !is_whole(range.start) || !is_whole(range.end) {
                return Err(format!("{range:?} are no full pages before position {}", row.position));
            }
            places.push(range.clone());
        }
        if remote.parts.iter().any(|part| part.ranges.windows(2).any(|pair| pair[0].end > pair[1].start)) {
            return Err("ranges must ascend".into());
        }
        places.sort_unstable_by_key(|place| place.start);
        let mut end = 0;
        for place in places {
            if place.start != end {
                return Err(format!("position {} is in no place or in two", place.start.min(end)));
            }
            end = place.end;
        }
        Ok(())
    }
}
