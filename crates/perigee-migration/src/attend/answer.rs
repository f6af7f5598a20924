//! Answers of a home: of each session that was asked about, in the same order, a status and, where that is good, outputs
//! and log-sum-exps. A home that cannot answer for one session still answers for the others.

use super::{
    AttendError, AttendShape, HeadRange, QueryBatch, SessionQuery, exact, open, put_floats, read_floats, seal,
};
use crate::codec::{FieldError, Put, Reader};

const MARK: u32 = u32::from_le_bytes(*b"PRGA");

/// Whether a home answered for a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AnswerStatus {
    /// Outputs follow.
    Answered,
    /// The home has no entry for the session: it never had one, or its lease ran out. The owner must rebuild.
    Unknown,
    /// The home knows a later epoch of the session: the asker does not own it any more.
    Stale,
    /// The home has an entry, but not all of the positions. The owner must rebuild those.
    Missing,
    /// The home cannot answer in time; ask again.
    Busy,
}

const STATUSES: [AnswerStatus; 5] =
    [AnswerStatus::Answered, AnswerStatus::Unknown, AnswerStatus::Stale, AnswerStatus::Missing, AnswerStatus::Busy];

/// One session's answer.
#[derive(Debug, Clone, PartialEq)]
pub struct SessionAnswer {
    /// The session.
    pub session: String,
    /// The epoch that asked.
    pub epoch: u64,
    /// Whether numbers follow.
    pub status: AnswerStatus,
    /// [tokens, heads, R], normalised; empty without an answer.
    pub output: Vec<f32>,
    /// [tokens, heads], natural logs; -inf where there was nothing to attend to.
    pub lse: Vec<f32>,
}

/// Answers to a [`QueryBatch`].
#[derive(Debug, Clone, PartialEq)]
pub struct AnswerBatch {
    /// Layer and heads, as asked.
    pub heads: HeadRange,
    /// One for every session asked about, in order.
    pub sessions: Vec<SessionAnswer>,
}

impl SessionAnswer {
    /// No numbers, and why.
    pub fn refused(query: &SessionQuery, status: AnswerStatus) -> Self {
        let SessionQuery { session, epoch, .. } = query;
        Self { session: session.clone(), epoch: *epoch, status, output: Vec::new(), lse: Vec::new() }
    }

    /// Numbers: `output` [tokens, heads, R] and `lse` [tokens, heads].
    pub fn answered(query: &SessionQuery, output: Vec<f32>, lse: Vec<f32>) -> Self {
        Self { output, lse, ..Self::refused(query, AnswerStatus::Answered) }
    }
}

impl AnswerBatch {
    /// Bytes of outputs and log-sum-exps alone, to be held against [`super::attention_bytes`].
    pub fn payload_bytes(&self) -> u64 {
        self.sessions.iter().map(|answer| (answer.output.len() + answer.lse.len()) as u64 * 4).sum()
    }

    /// The message that answers `query`.
    ///
    /// # Errors
    /// Answers that the asker would refuse.
    pub fn encode(&self, query: &QueryBatch) -> Result<Vec<u8>, AttendError> {
        self.check(query)?;
        let mut body = Vec::with_capacity(self.payload_bytes() as usize + 64 * (1 + self.sessions.len()));
        self.heads.put(&mut body);
        body.u32(self.sessions.len() as u32);
        for answer in &self.sessions {
            body.text(&answer.session);
            body.u64(answer.epoch);
            body.u8(STATUSES.iter().position(|&status| status == answer.status).unwrap_or_default() as u8);
            put_floats(&mut body, &answer.output);
            put_floats(&mut body, &answer.lse);
        }
        Ok(seal(MARK, &body))
    }

    /// Reads the answer to `query`.
    ///
    /// # Errors
    /// [`AttendError`] says what is wrong with it. The row's step has no answer then.
    pub fn decode(bytes: &[u8], query: &QueryBatch, shape: &AttendShape) -> Result<Self, AttendError> {
        let mut reader = open(MARK, bytes)?;
        let heads = HeadRange::read(&mut reader)?;
        heads.check(shape)?;
        exact("sessions", query.sessions.len() as u64, reader.u32("number of sessions")?)?;
        let sessions = query.sessions.iter().map(|asked| read_answer(&mut reader, heads, asked));
        let sessions = sessions.collect::<Result<_, FieldError>>()?;
        reader.end()?;
        let batch = Self { heads, sessions };
        batch.check(query)?;
        Ok(batch)
    }

    fn check(&self, query: &QueryBatch) -> Result<(), AttendError> {
        if self.heads != query.heads {
            let (expected, found) = (format!("{:?}", query.heads), format!("{:?}", self.heads));
            return Err(AttendError::Mismatch { expected, found });
        }
        exact("sessions", query.sessions.len() as u64, self.sessions.len() as u64)?;
        self.sessions.iter().zip(&query.sessions).try_for_each(|(answer, asked)| answer.check(asked, self.heads))
    }
}

impl SessionAnswer {
    fn check(&self, asked: &SessionQuery, heads: HeadRange) -> Result<(), AttendError> {
        if (&self.session, self.epoch) != (&asked.session, asked.epoch) {
            let name = |session: &str, epoch: u64| format!("session {session} in epoch {epoch}");
            let (expected, found) = (name(&asked.session, asked.epoch), name(&self.session, self.epoch));
            return Err(AttendError::Mismatch { expected, found });
        }
        let tokens = if self.status == AnswerStatus::Answered { u64::from(asked.tokens) } else { 0 };
        exact("numbers of outputs", tokens * heads.output_width(), self.output.len() as u64)?;
        exact("numbers of log-sum-exps", tokens * u64::from(heads.heads), self.lse.len() as u64)?;
        let wrong = |what| AttendError::NotFinite { session: self.session.clone(), what };
        // Without an early end, so that many are looked at at once.
        if !self.output.iter().fold(true, |all, value| all & value.is_finite()) {
            return Err(wrong("outputs"));
        }
        if self.lse.iter().any(|&lse| !(lse.is_finite() || lse == f32::NEG_INFINITY)) {
            return Err(wrong("log-sum-exps"));
        }
        Ok(())
    }
}

fn read_answer(reader: &mut Reader<'_>, heads: HeadRange, asked: &SessionQuery) -> Result<SessionAnswer, FieldError> {
    let (session, epoch) = (reader.text("session")?, reader.u64("epoch")?);
    let number = reader.u8("status")?;
    let status = STATUSES.get(usize::from(number)).copied();
    let status = status.ok_or(FieldError::Value { field: "status", found: number.into() })?;
    let tokens = if status == AnswerStatus::Answered { u64::from(asked.tokens) } else { 0 };
    let output = read_floats(reader, "outputs", tokens * heads.output_width())?;
    let lse = read_floats(reader, "log-sum-exps", tokens * u64::from(heads.heads))?;
    Ok(SessionAnswer { session, epoch, status, output, lse })
}
