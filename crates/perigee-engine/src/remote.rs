//! A step's rows whose older keys are at other replicas: what the plan says of them, who carries the questions, and what
//! asking cost. Connections are the transport's business ([`AttentionClient`]), and what becomes of a row without an
//! answer is the engine's.

use std::ops::Range;
use std::time::{Duration, Instant};

use perigee_migration::AttendShape;
use serde::{Deserialize, Serialize};

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
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
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

/// A rank's way to ask.
pub(crate) struct RemoteAttention {
    pub(crate) client: Box<dyn AttentionClient>,
    pub(crate) shape: AttendShape,
}
