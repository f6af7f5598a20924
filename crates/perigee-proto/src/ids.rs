//! Names that cross processes: sessions, requests and routers, as parsed types. Randomness is handed in, so that a
//! simulated cluster draws the same names every time.

use std::fmt;

/// Longest request id that a client may choose, in bytes.
pub const MAX_REQUEST_ID_BYTES: usize = 128;

/// A session's name: unique in the cluster and not to be guessed, since who knows it may abort it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(String);

impl SessionId {
    /// The name made of 128 random bits.
    pub fn from_random(high: u64, low: u64) -> Self {
        Self(format!("s-{high:016x}{low:016x}"))
    }

    /// A name that came over the wire.
    ///
    /// # Errors
    /// [`InvalidId`] unless it has the shape that [`SessionId::from_random`] gives.
    pub fn parse(text: &str) -> Result<Self, InvalidId> {
        let invalid = InvalidId { what: "session id", rule: "s- and 32 lower-case hexadecimal digits" };
        Self::number(text).map(|_| Self(text.to_owned())).ok_or(invalid)
    }

    /// The 128 bits that a name was made of; none where it has another shape.
    pub fn number(text: &str) -> Option<u128> {
        let (high, low) = text.strip_prefix("s-")?.as_bytes().split_first_chunk::<16>()?;
        let low = low.try_into().ok()?;
        Some(u128::from(hexadecimal(high)?) << 64 | u128::from(hexadecimal(low)?))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The number of 16 lower-case digits.
fn hexadecimal(digits: &[u8; 16]) -> Option<u64> {
    let mut number = 0;
    for digit in digits {
        let value = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        number = number << 4 | u64::from(value);
    }
    Some(number)
}

impl fmt::Display for SessionId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// A request's name in logs and for Abort. Clients choose it, so it need not be unique.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(String);

impl RequestId {
    /// A name for a request whose client gave none.
    pub fn from_random(bits: u64) -> Self {
        Self(format!("r-{bits:016x}"))
    }

    /// A name that a client chose.
    ///
    /// # Errors
    /// [`InvalidId`] unless it is 1 to [`MAX_REQUEST_ID_BYTES`] printable ASCII characters: it goes into log lines.
    pub fn parse(text: &str) -> Result<Self, InvalidId> {
        let printable = text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
        if text.is_empty() || text.len() > MAX_REQUEST_ID_BYTES || !printable {
            return Err(InvalidId { what: "request id", rule: "1 to 128 printable ASCII characters" });
        }
        Ok(Self(text.to_owned()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// One run of a router process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouterId(pub u64);

impl fmt::Display for RouterId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:016x}", self.0)
    }
}

/// A name that does not have the shape of its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a {what} is {rule}")]
pub struct InvalidId {
    /// What it should have been.
    pub what: &'static str,
    /// The shape that it must have.
    pub rule: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn session_ids_parse_back_and_nothing_else_does() {
        let id = SessionId::from_random(1, u64::MAX);
        assert_eq!(id.as_str(), "s-0000000000000001ffffffffffffffff");
        assert_eq!(SessionId::number(id.as_str()), Some(1 << 64 | u128::from(u64::MAX)));
        assert_eq!(SessionId::number("s-0123456789abcdef0000000000000010"), Some(0x0123_4567_89ab_cdef << 64 | 16));
        assert_eq!(SessionId::parse(id.as_str()), Ok(id));
        for bad in ["", "s-", "x-0000000000000001ffffffffffffffff", "s-0000000000000001FFFFFFFFFFFFFFFF", "s-12"] {
            assert!(SessionId::parse(bad).is_err(), "{bad:?} parsed");
        }
    }

    #[test]
    fn request_ids_are_printable_and_short() {
        assert!(RequestId::parse("my request-7").is_ok());
        assert!(RequestId::parse(&"a".repeat(MAX_REQUEST_ID_BYTES)).is_ok());
        for bad in ["".to_owned(), "a\nb".to_owned(), "ä".to_owned(), "a".repeat(MAX_REQUEST_ID_BYTES + 1)] {
            assert!(RequestId::parse(&bad).is_err(), "{bad:?} parsed");
        }
        assert_eq!(RequestId::from_random(255).as_str(), "r-00000000000000ff");
    }
}
