//! Numbers and names as bytes, little-endian, for the formats of this crate. Reading checks every length against what is
//! there before anything is allocated; what a field means is its format's business.

use std::fmt;

use perigee_backend::{DType, StateKind};

use crate::geometry::{Layout, STATE_KINDS};

/// A field that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FieldError {
    /// The bytes end before the field does.
    #[error("{field} needs {needed} bytes, {left} are left")]
    Short {
        /// The field.
        field: &'static str,
        /// Bytes that it needs.
        needed: u64,
        /// Bytes that are left.
        left: u64,
    },
    /// A name is not text.
    #[error("{field} is not UTF-8")]
    Text {
        /// The field.
        field: &'static str,
    },
    /// A value that this version has no meaning for.
    #[error("{field} is {found}, which means nothing in this version")]
    Value {
        /// The field.
        field: &'static str,
        /// The value.
        found: u64,
    },
    /// Bytes are left after the last field.
    #[error("{left} bytes after the last field")]
    Rest {
        /// How many.
        left: u64,
    },
}

/// Appends fields to bytes.
pub(crate) trait Put {
    fn put(&mut self, bytes: &[u8]);

    fn u8(&mut self, value: u8) {
        self.put(&[value]);
    }

    fn u16(&mut self, value: u16) {
        self.put(&value.to_le_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.put(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.put(&value.to_le_bytes());
    }

    /// A length of two bytes, then the text. Longer text than that length can tell is cut, so the other side's checks
    /// refuse it by its content; names in the cluster are far shorter.
    fn text(&mut self, value: &str) {
        let bytes = value.as_bytes();
        let length = bytes.len().min(usize::from(u16::MAX));
        self.u16(length as u16);
        self.put(&bytes[..length]);
    }

    fn dtype(&mut self, value: DType) {
        self.u8(match value {
            DType::Bf16 => 1,
            DType::Fp32 => 2,
        });
    }

    fn kind(&mut self, value: StateKind) {
        let index = STATE_KINDS.iter().position(|&kind| kind == value).unwrap_or_default();
        self.u8(index as u8);
    }

    fn layout(&mut self, value: Layout) {
        self.u8(value.number());
    }
}

impl Put for Vec<u8> {
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

/// Takes fields from bytes.
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// The next `count` bytes.
    pub(crate) fn take(&mut self, field: &'static str, count: u64) -> Result<&'a [u8], FieldError> {
        let split = usize::try_from(count).ok().and_then(|count| self.rest.split_at_checked(count));
        let Some((taken, rest)) = split else {
            return Err(FieldError::Short { field, needed: count, left: self.left() });
        };
        self.rest = rest;
        Ok(taken)
    }

    pub(crate) fn u8(&mut self, field: &'static str) -> Result<u8, FieldError> {
        self.array(field).map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self, field: &'static str) -> Result<u16, FieldError> {
        self.array(field).map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self, field: &'static str) -> Result<u32, FieldError> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, field: &'static str) -> Result<u64, FieldError> {
        self.array(field).map(u64::from_le_bytes)
    }

    pub(crate) fn text(&mut self, field: &'static str) -> Result<String, FieldError> {
        let length = self.u16(field)?;
        let bytes = self.take(field, length.into())?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| FieldError::Text { field })
    }

    pub(crate) fn dtype(&mut self, field: &'static str) -> Result<DType, FieldError> {
        match self.u8(field)? {
            1 => Ok(DType::Bf16),
            2 => Ok(DType::Fp32),
            found => Err(FieldError::Value { field, found: found.into() }),
        }
    }

    pub(crate) fn kind(&mut self, field: &'static str) -> Result<StateKind, FieldError> {
        let number = self.u8(field)?;
        STATE_KINDS.get(usize::from(number)).copied().ok_or(FieldError::Value { field, found: number.into() })
    }

    pub(crate) fn layout(&mut self, field: &'static str) -> Result<Layout, FieldError> {
        let number = self.u8(field)?;
        Layout::from_number(number).ok_or(FieldError::Value { field, found: number.into() })
    }

    /// Nothing may be left.
    pub(crate) fn end(self) -> Result<(), FieldError> {
        if self.rest.is_empty() { Ok(()) } else { Err(FieldError::Rest { left: self.left() }) }
    }

    pub(crate) fn left(&self) -> u64 {
        self.rest.len() as u64
    }

    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], FieldError> {
        let Some((taken, rest)) = self.rest.split_first_chunk() else {
            return Err(FieldError::Short { field, needed: N as u64, left: self.left() });
        };
        self.rest = rest;
        Ok(*taken)
    }
}

/// CRC-32 of several runs of bytes as if they were one (the polynomial of zlib and Ethernet).
pub(crate) fn crc(runs: &[&[u8]]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    runs.iter().for_each(|run| hasher.update(run));
    hasher.finalize()
}

/// A checksum as errors print it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Crc(pub u32);

impl fmt::Display for Crc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_come_back_and_lengths_do_not_lie() {
        let mut bytes = Vec::new();
        bytes.u16(0x1234);
        bytes.text("naïve");
        bytes.dtype(DType::Bf16);
        bytes.kind(StateKind::ConvV);
        bytes.layout(Layout::ByPosition);
        assert_eq!(bytes[..2], [0x34, 0x12]);
        let mut reader = Reader::new(&bytes);
        assert_eq!(reader.u16("a"), Ok(0x1234));
        assert_eq!(reader.text("b").as_deref(), Ok("naïve"));
        assert_eq!(reader.dtype("c"), Ok(DType::Bf16));
        assert_eq!(reader.kind("d"), Ok(StateKind::ConvV));
        assert_eq!(reader.layout("e"), Ok(Layout::ByPosition));
        assert_eq!(reader.u8("f"), Err(FieldError::Short { field: "f", needed: 1, left: 0 }));
        assert_eq!(reader.end(), Ok(()));
        assert_eq!(Reader::new(&[5]).end(), Err(FieldError::Rest { left: 1 }));
    }

    #[test]
    fn what_means_nothing_is_refused() {
        assert_eq!(Reader::new(&[2, 0, 0xff, 0xff]).text("name"), Err(FieldError::Text { field: "name" }));
        assert_eq!(Reader::new(&[9, 0, 1]).text("name"), Err(FieldError::Short { field: "name", needed: 9, left: 1 }));
        assert_eq!(
            Reader::new(&[1]).take("bytes", u64::MAX),
            Err(FieldError::Short { field: "bytes", needed: u64::MAX, left: 1 })
        );
        for (value, result) in [
            (0, Reader::new(&[0]).dtype("dtype").map(drop)),
            (4, Reader::new(&[4]).kind("kind").map(drop)),
            (2, Reader::new(&[2]).layout("layout").map(drop)),
        ] {
            assert!(matches!(result, Err(FieldError::Value { found, .. }) if found == value), "{result:?}");
        }
    }

    #[test]
    fn the_checksum_is_the_usual_one() {
        assert_eq!(crc(&[b"1234", b"56789"]), 0xcbf4_3926);
    }
}
