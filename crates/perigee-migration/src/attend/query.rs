//! Queries to a home. Of each session: name, epoch, ranges of positions to attend to, and the queries of one token or
//! more. A home answers a session once, over all its ranges together, so one number of answers comes back however often
//! the session was there.

use std::ops::Range;

use perigee_backend::DType;

use super::{
    AttendError, AttendShape, HeadRange, MOST_ENTRIES, check_positions, exact, limit, open, put_floats, put_numbers,
    read_floats, seal,
};
use crate::codec::{FieldError, Put, Reader};

const MARK: u32 = u32::from_le_bytes(*b"PRGQ");

/// Queries in the type in which they travel.
#[derive(Debug, Clone, PartialEq)]
pub enum QueryValues {
    /// Float32.
    Fp32(Vec<f32>),
    /// The upper halves of float32 numbers, rounded.
    Bf16(Vec<u16>),
}

/// One session's queries.
#[derive(Debug, Clone, PartialEq)]
pub struct SessionQuery {
    /// The session.
    pub session: String,
    /// Its epoch at the owner; a home refuses an earlier one than it knows and renews its lease by others.
    pub epoch: u64,
    /// Positions, ascending and disjoint, in whole pages.
    pub ranges: Vec<Range<u64>>,
    /// Tokens that ask.
    pub tokens: u32,
    /// [tokens, heads, R + r], absorbed, not scaled.
    pub values: QueryValues,
}

/// All queries of a layer and a head range for one home.
#[derive(Debug, Clone, PartialEq)]
pub struct QueryBatch {
    /// Layer and heads.
    pub heads: HeadRange,
    /// Type of all queries.
    pub dtype: DType,
    /// The sessions.
    pub sessions: Vec<SessionQuery>,
}

impl QueryValues {
    /// Queries in the type in which they are to travel.
    pub fn from_f32(values: &[f32], dtype: DType) -> Self {
        match dtype {
            DType::Fp32 => Self::Fp32(values.to_vec()),
            DType::Bf16 => Self::Bf16(values.iter().map(|&value| to_bf16(value)).collect()),
        }
    }

    /// As float32.
    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            Self::Fp32(values) => values.clone(),
            Self::Bf16(values) => values.iter().map(|&half| f32::from_bits(u32::from(half) << 16)).collect(),
        }
    }

    /// How many numbers.
    pub fn len(&self) -> usize {
        match self {
            Self::Fp32(values) => values.len(),
            Self::Bf16(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The type.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Fp32(_) => DType::Fp32,
            Self::Bf16(_) => DType::Bf16,
        }
    }

    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Self::Fp32(values) => put_floats(out, values),
            Self::Bf16(values) => put_numbers(out, values, u16::to_le_bytes),
        }
    }

    fn read(reader: &mut Reader<'_>, dtype: DType, count: u64) -> Result<Self, FieldError> {
        if dtype == DType::Fp32 {
            return read_floats(reader, "queries", count).map(Self::Fp32);
        }
        let bytes = reader.take("queries", count.saturating_mul(2))?;
        Ok(Self::Bf16(bytes.as_chunks().0.iter().map(|&half| u16::from_le_bytes(half)).collect()))
    }
}

impl QueryBatch {
    /// Bytes of queries alone, to be held against [`super::attention_bytes`].
    pub fn payload_bytes(&self) -> u64 {
        self.sessions.iter().map(|query| query.values.len() as u64 * self.dtype.bytes() as u64).sum()
    }

    /// The message.
    ///
    /// # Errors
    /// Shapes that a home of `shape` would refuse.
    pub fn encode(&self, shape: &AttendShape) -> Result<Vec<u8>, AttendError> {
        self.check(shape)?;
        let mut body = Vec::with_capacity(self.payload_bytes() as usize + 128 * (1 + self.sessions.len()));
        self.heads.put(&mut body);
        body.dtype(self.dtype);
        body.u32(self.sessions.len() as u32);
        for query in &self.sessions {
            body.text(&query.session);
            body.u64(query.epoch);
            body.u32(query.ranges.len() as u32);
            for range in &query.ranges {
                body.u64(range.start);
                body.u64(range.end - range.start);
            }
            body.u32(query.tokens);
            query.values.put(&mut body);
        }
        Ok(seal(MARK, &body))
    }

    /// Reads a message for a model of `shape`.
    ///
    /// # Errors
    /// [`AttendError`] says what is wrong with it; nothing of it may be used.
    pub fn decode(bytes: &[u8], shape: &AttendShape) -> Result<Self, AttendError> {
        let mut reader = open(MARK, bytes)?;
        let heads = HeadRange::read(&mut reader)?;
        heads.check(shape)?;
        let dtype = reader.dtype("element type")?;
        let count = reader.u32("number of sessions")?;
        limit("sessions", MOST_ENTRIES, count)?;
        // Not allocated ahead: the count is the sender's word.
        let mut sessions = Vec::new();
        for _ in 0..count {
            let session = reader.text("session")?;
            let epoch = reader.u64("epoch")?;
            let ranges = read_ranges(&mut reader)?;
            let tokens = reader.u32("number of tokens")?;
            limit("tokens of a session, at most", shape.tokens, tokens)?;
            let values = QueryValues::read(&mut reader, dtype, u64::from(tokens) * heads.query_width())?;
            sessions.push(SessionQuery { session, epoch, ranges, tokens, values });
        }
        reader.end()?;
        let batch = Self { heads, dtype, sessions };
        batch.check(shape)?;
        Ok(batch)
    }

    fn check(&self, shape: &AttendShape) -> Result<(), AttendError> {
        self.heads.check(shape)?;
        limit("sessions", MOST_ENTRIES, self.sessions.len() as u64)?;
        for query in &self.sessions {
            limit("bytes of a session's name", u16::MAX, query.session.len() as u64)?;
            limit("tokens of a session, at most", shape.tokens, query.tokens)?;
            limit("ranges of a session", MOST_ENTRIES, query.ranges.len() as u64)?;
            let mut end = 0;
            for range in &query.ranges {
                if range.start < end {
                    return Err(AttendError::Shape { what: "range from", expected: end, found: range.start });
                }
                end = check_positions(range.start, range.end.saturating_sub(range.start))?;
            }
            if query.ranges.is_empty() || query.tokens == 0 {
                return Err(AttendError::Shape { what: "ranges or tokens of a session", expected: 1, found: 0 });
            }
            if query.values.dtype() != self.dtype {
                return Err(AttendError::Dtype { session: query.session.clone(), expected: self.dtype });
            }
            let expected = u64::from(query.tokens) * self.heads.query_width();
            exact("numbers of queries", expected, query.values.len() as u64)?;
        }
        Ok(())
    }
}

fn read_ranges(reader: &mut Reader<'_>) -> Result<Vec<Range<u64>>, AttendError> {
    let count = reader.u32("number of ranges")?;
    limit("ranges of a session", MOST_ENTRIES, count)?;
    let mut ranges = Vec::new();
    for _ in 0..count {
        let (first, tokens) = (reader.u64("first position")?, reader.u64("number of positions")?);
        ranges.push(first..check_positions(first, tokens)?);
    }
    Ok(ranges)
}

/// Round to nearest, ties to even, as every backend does; not-a-number stays one.
fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    (rounded >> 16) as u16
}
