//! Queries and answers of split attention, one message each for one layer, one head range and all sessions that have
//! latents on one home. Queries are absorbed and not yet scaled; answers are normalised outputs in latent space with the
//! natural log of the sums of exponentials, so they merge (`merge.rs`). Nothing here computes attention.
//!
//! All queried positions lie in full pages, before any position that asks: a home needs no causal mask. A message:
//!
//! | bytes | field |
//! | --- | --- |
//! | 4 | `PRGQ` or `PRGA` |
//! | 2 | version |
//! | 4 | CRC-32 of everything behind it |
//! | 4, 4, 4 | layer (index among the MLA layers), first head, heads |
//! | 4, 4 | R, r |
//! | 1 | element type of the queries; not in answers, which are float32 |
//! | 4 | number of sessions |
//! | sessions | see `attend/query.rs`, `attend/answer.rs` |

mod answer;
mod query;
#[cfg(test)]
mod tests;

pub use answer::{AnswerBatch, AnswerStatus, SessionAnswer};
pub use query::{QueryBatch, QueryValues, SessionQuery};

use perigee_backend::DType;

use crate::codec::{Crc, FieldError, Put, Reader, crc};
use crate::geometry::PAGE_POSITIONS;

/// Version of both formats.
pub const ATTEND_VERSION: u16 = 1;

/// Most sessions of a message, and most ranges of a session.
const MOST_ENTRIES: u32 = 1 << 16;

/// Mark, version and checksum.
const PREFIX: usize = 10;

/// Which heads of which layer, and how wide they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HeadRange {
    /// Index among the MLA layers.
    pub layer: u32,
    /// First head, counted over the whole model.
    pub first_head: u32,
    /// Number of heads.
    pub heads: u32,
    /// Width of the latent, R.
    pub latent: u32,
    /// Width of the shared key, r.
    pub rope: u32,
}

/// What a home or an asker expects of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttendShape {
    /// MLA layers.
    pub layers: u32,
    /// MLA heads of the whole model.
    pub heads: u32,
    /// Width of the latent, R.
    pub latent: u32,
    /// Width of the shared key, r.
    pub rope: u32,
    /// Most tokens of a session in one message (a prefill chunk sends bounded blocks).
    pub tokens: u32,
}

/// Why a message cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AttendError {
    /// It is not this kind of message.
    #[error("an attention message begins with {expected:08x}, this one with {found:08x}")]
    Mark {
        /// The mark.
        expected: u32,
        /// What is there.
        found: u32,
    },
    /// Another version of the format.
    #[error("version {found} of attention messages, this replica reads version {expected}")]
    Version {
        /// The version of this build.
        expected: u16,
        /// The version of the message.
        found: u16,
    },
    /// Its bytes changed on the way.
    #[error("an attention message's checksum is {found}, expected {expected}")]
    Crc {
        /// The checksum that it carries.
        expected: Crc,
        /// The checksum of what arrived.
        found: Crc,
    },
    /// A field cannot be read.
    #[error("attention message: {0}")]
    Field(#[from] FieldError),
    /// A size or index does not fit the model or the question.
    #[error("attention message: {what} {found}, expected {expected}")]
    Shape {
        /// What is counted.
        what: &'static str,
        /// What it should be, or may be at most.
        expected: u64,
        /// What it is.
        found: u64,
    },
    /// The queries' numbers are in another type than was said.
    #[error("queries of session {session} are not in {expected:?}")]
    Dtype {
        /// The session.
        session: String,
        /// The type of the message.
        expected: DType,
    },
    /// An answer is for another session, epoch or head range than was asked.
    #[error("an answer about {found}, expected {expected}")]
    Mismatch {
        /// What was asked.
        expected: String,
        /// What was answered.
        found: String,
    },
    /// An answer has numbers that no attention gives.
    #[error("session {session}: {what} are not finite; the home's pages are damaged")]
    NotFinite {
        /// The session.
        session: String,
        /// Which numbers.
        what: &'static str,
    },
}

/// Bytes that asking costs for one token: queries there and answers back, for every MLA layer and remote home, with an
/// `element` of the queries' type. Where a home's ranks all have the latents, one of them answers each head range, so the
/// tensor-parallel degrees do not matter. Names, counts and checksums are counted apart.
pub fn attention_bytes(shape: &AttendShape, element: DType, homes: u64) -> u64 {
    let (heads, latent, rope) = (u64::from(shape.heads), u64::from(shape.latent), u64::from(shape.rope));
    let queries = heads * (latent + rope) * element.bytes() as u64;
    let answers = heads * (latent + 1) * 4;
    homes * u64::from(shape.layers) * (queries + answers)
}

/// Tokens after which fetching the latents of `context` positions costs less than asking one home for every further
/// token; `latent` is their element type.
pub fn break_even_tokens(shape: &AttendShape, element: DType, latent: DType, context: u64) -> u64 {
    let width = u64::from(shape.latent) + u64::from(shape.rope);
    let pages = context * width * latent.bytes() as u64 * u64::from(shape.layers);
    pages.div_ceil(attention_bytes(shape, element, 1).max(1))
}

impl HeadRange {
    /// Numbers of one token's queries, all heads.
    pub fn query_width(&self) -> u64 {
        u64::from(self.heads) * (u64::from(self.latent) + u64::from(self.rope))
    }

    /// Numbers of one token's outputs, all heads.
    pub fn output_width(&self) -> u64 {
        u64::from(self.heads) * u64::from(self.latent)
    }

    /// Checks layer, heads and widths.
    fn check(&self, shape: &AttendShape) -> Result<(), AttendError> {
        exact("latent width", shape.latent, self.latent)?;
        exact("shared key width", shape.rope, self.rope)?;
        let end = u64::from(self.first_head) + u64::from(self.heads);
        if self.heads == 0 || end > shape.heads.into() {
            return Err(AttendError::Shape { what: "heads up to", expected: shape.heads.into(), found: end });
        }
        if self.layer >= shape.layers {
            let (expected, found) = (shape.layers.saturating_sub(1).into(), self.layer.into());
            return Err(AttendError::Shape { what: "MLA layer, at most", expected, found });
        }
        Ok(())
    }

    fn put(&self, out: &mut Vec<u8>) {
        [self.layer, self.first_head, self.heads, self.latent, self.rope].iter().for_each(|&field| out.u32(field));
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, FieldError> {
        Ok(Self {
            layer: reader.u32("layer")?,
            first_head: reader.u32("first head")?,
            heads: reader.u32("number of heads")?,
            latent: reader.u32("latent width")?,
            rope: reader.u32("shared key width")?,
        })
    }
}

fn exact(what: &'static str, expected: impl Into<u64>, found: impl Into<u64>) -> Result<(), AttendError> {
    let (expected, found) = (expected.into(), found.into());
    if expected == found { Ok(()) } else { Err(AttendError::Shape { what, expected, found }) }
}

fn limit(what: &'static str, limit: impl Into<u64>, found: impl Into<u64>) -> Result<(), AttendError> {
    let (expected, found) = (limit.into(), found.into());
    if found <= expected { Ok(()) } else { Err(AttendError::Shape { what, expected, found }) }
}

/// A message of a kind: mark, version, checksum, body.
fn seal(mark: u32, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(PREFIX + body.len());
    out.u32(mark);
    out.u16(ATTEND_VERSION);
    out.u32(crc(&[body]));
    out.put(body);
    out
}

/// The body of a message of a kind.
fn open(mark: u32, bytes: &[u8]) -> Result<Reader<'_>, AttendError> {
    let mut reader = Reader::new(bytes);
    let found = reader.u32("mark")?;
    if found != mark {
        return Err(AttendError::Mark { expected: mark, found });
    }
    let version = reader.u16("version")?;
    if version != ATTEND_VERSION {
        return Err(AttendError::Version { expected: ATTEND_VERSION, found: version });
    }
    let expected = Crc(reader.u32("checksum")?);
    let found = Crc(crc(&[bytes.get(PREFIX..).unwrap_or_default()]));
    if found != expected {
        return Err(AttendError::Crc { expected, found });
    }
    Ok(reader)
}

/// Positions must begin and end between pages.
fn check_positions(first: u64, tokens: u64) -> Result<u64, AttendError> {
    let end = first.checked_add(tokens).filter(|_| tokens > 0).ok_or(AttendError::Shape {
        what: "positions of a range",
        expected: PAGE_POSITIONS,
        found: tokens,
    })?;
    for position in [first, end] {
        exact("range boundary", position - position % PAGE_POSITIONS, position)?;
    }
    Ok(end)
}

/// Appends numbers all at once: there are tens of thousands in every message.
fn put_numbers<const N: usize, T: Copy>(out: &mut Vec<u8>, values: &[T], bytes: impl Fn(T) -> [u8; N]) {
    let begin = out.len();
    out.resize(begin + N * values.len(), 0);
    let places = out[begin..].as_chunks_mut().0;
    places.iter_mut().zip(values).for_each(|(place, &value)| *place = bytes(value));
}

fn put_floats(out: &mut Vec<u8>, values: &[f32]) {
    put_numbers(out, values, f32::to_le_bytes);
}

/// `count` numbers; the bytes are there before room is made for them.
fn read_floats(reader: &mut Reader<'_>, field: &'static str, count: u64) -> Result<Vec<f32>, FieldError> {
    let bytes = reader.take(field, count.saturating_mul(4))?;
    Ok(bytes.as_chunks().0.iter().map(|&value| f32::from_le_bytes(value)).collect())
}
