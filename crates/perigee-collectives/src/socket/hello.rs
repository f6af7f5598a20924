//! What two ranks say when they meet: a hello by the one that connects, an answer by the one that listens. Fixed layouts
//! with bounded lengths, parsed before anything is believed; the first six bytes of a hello and the twenty of an answer
//! stay the same in every protocol version, so that another version is refused by name.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::SocketConfig;
use crate::Refusal;

/// The protocol's version; raised whenever a frame, a hello or the rounds of a collective change.
pub(super) const VERSION: u16 = 1;

// Different marks, so that a connection that reaches itself or an echo is not taken for an answer.
const HELLO_MAGIC: [u8; 4] = *b"PRGh";
const ANSWER_MAGIC: [u8; 4] = *b"PRGa";

const HELLO_FIXED_BYTES: usize = 43;
const ADDRESS_BYTES: usize = 19;

/// The longest hello.
pub(super) const HELLO_MAX_BYTES: usize = HELLO_FIXED_BYTES + super::MAX_GROUP_BYTES;

/// Bytes of an answer before its table.
pub(super) const ANSWER_FIXED_BYTES: usize = 20;

/// Why a rank connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To rank 0, to be told where the others are.
    Register,
    /// To a lower rank, to become the link between the two.
    Link,
}

/// Who connects, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) purpose: Purpose,
    pub(super) rank: usize,
    pub(super) size: usize,
    pub(super) incarnation: u64,
    pub(super) group: String,
    /// Where this rank listens for higher ranks.
    pub(super) listens_at: SocketAddr,
}

/// What the bytes received so far amount to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Parsed {
    /// The beginning of a hello.
    Incomplete,
    /// A hello.
    Hello(Hello),
    /// A hello in another version.
    OtherVersion(u16),
    /// Nothing of ours.
    Garbage,
}

impl Hello {
    pub(super) fn new(config: &SocketConfig, purpose: Purpose, listens_at: SocketAddr) -> Self {
        Self {
            purpose,
            rank: config.rank,
            size: config.size,
            incarnation: config.incarnation,
            group: config.group.clone(),
            listens_at,
        }
    }

    /// Layout, little-endian: magic, version u16, purpose u8, group length u8, rank u32, size u32, incarnation u64,
    /// address, group.
    pub(super) fn encode(&self) -> Vec<u8> {
        let purpose = match self.purpose {
            Purpose::Register => 1,
            Purpose::Link => 2,
        };
        // The configuration's check bounds all three numbers.
        let group_bytes = u8::try_from(self.group.len()).unwrap_or(u8::MAX);
        let number = |value: usize| u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes();
        let mut bytes = Vec::with_capacity(HELLO_MAX_BYTES);
        bytes.extend(HELLO_MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend([purpose, group_bytes]);
        bytes.extend(number(self.rank));
        bytes.extend(number(self.size));
        bytes.extend(self.incarnation.to_le_bytes());
        bytes.extend(encode_address(self.listens_at));
        bytes.extend(self.group.as_bytes());
        bytes
    }

    pub(super) fn parse(bytes: &[u8]) -> Parsed {
        let known = bytes.len().min(HELLO_MAGIC.len());
        if bytes[..known] != HELLO_MAGIC[..known] {
            return Parsed::Garbage;
        }
        let mut fields = Fields(bytes.get(HELLO_MAGIC.len()..).unwrap_or_default());
        match fields.take().map(u16::from_le_bytes) {
            None => return Parsed::Incomplete,
            Some(VERSION) => {}
            Some(other) => return Parsed::OtherVersion(other),
        }
        if bytes.len() < HELLO_FIXED_BYTES {
            return Parsed::Incomplete;
        }
        Self::parse_fields(fields).unwrap_or(Parsed::Garbage)
    }

    fn parse_fields(mut fields: Fields<'_>) -> Option<Parsed> {
        let [purpose, group_bytes] = fields.take()?;
        let purpose = match purpose {
            1 => Purpose::Register,
            2 => Purpose::Link,
            _ => return None,
        };
        let rank = usize::try_from(u32::from_le_bytes(fields.take()?)).ok()?;
        let size = usize::try_from(u32::from_le_bytes(fields.take()?)).ok()?;
        let incarnation = u64::from_le_bytes(fields.take()?);
        let listens_at = decode_address(fields.take()?)?;
        let Fields(group) = fields;
        if group.len() < usize::from(group_bytes) {
            return Some(Parsed::Incomplete);
        }
        if group.len() > usize::from(group_bytes) {
            // A rank says nothing after its hello before it is answered.
            return None;
        }
        let group = str::from_utf8(group).ok()?.to_owned();
        Some(Parsed::Hello(Self { purpose, rank, size, incarnation, group, listens_at }))
    }
}

/// The answer to a hello.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    /// Come in. Rank 0 says where ranks 1, 2, ... listen; other ranks have nothing to add.
    Welcome(Vec<SocketAddr>),
    /// Stay out.
    Refused(Refusal),
}

impl Answer {
    /// Layout, little-endian: magic, version u16, status u8, zero u8, expected u64, number of addresses u32, addresses.
    pub(super) fn encode(&self) -> Vec<u8> {
        let (status, expected, table): (u8, u64, &[SocketAddr]) = match self {
            Self::Welcome(table) => (0, 0, table),
            Self::Refused(Refusal::Version { expected, .. }) => (1, u64::from(*expected), &[]),
            Self::Refused(Refusal::Group { .. }) => (2, 0, &[]),
            Self::Refused(Refusal::Incarnation) => (3, 0, &[]),
            Self::Refused(Refusal::Size { expected, .. }) => (4, *expected as u64, &[]),
            Self::Refused(Refusal::RankOutOfRange { size, .. }) => (5, *size as u64, &[]),
            Self::Refused(Refusal::DuplicateRank { .. }) => (6, 0, &[]),
        };
        let mut bytes = Vec::with_capacity(ANSWER_FIXED_BYTES + table.len() * ADDRESS_BYTES);
        bytes.extend(ANSWER_MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend([status, 0]);
        bytes.extend(expected.to_le_bytes());
        bytes.extend(u32::try_from(table.len()).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend(table.iter().flat_map(|&address| encode_address(address)));
        bytes
    }

    /// Reads the fixed part of an answer to `hello`. Returns the answer, without its table, and the number of bytes that
    /// the table takes; `None` if this is no answer, or one with a table of the wrong length for this hello.
    pub(super) fn parse(bytes: &[u8; ANSWER_FIXED_BYTES], hello: &Hello) -> Option<(Self, usize)> {
        let mut fields = Fields(bytes);
        if fields.take()? != ANSWER_MAGIC {
            return None;
        }
        let version = u16::from_le_bytes(fields.take()?);
        let [status, _] = fields.take()?;
        let expected = u64::from_le_bytes(fields.take()?);
        let entries = usize::try_from(u32::from_le_bytes(fields.take()?)).ok()?;
        let expected_entries = if hello.purpose == Purpose::Register { hello.size - 1 } else { 0 };
        let expected_number = usize::try_from(expected).unwrap_or(usize::MAX);
        let refusal = match status {
            0 if version == VERSION && entries == expected_entries => {
                return Some((Self::Welcome(Vec::new()), entries * ADDRESS_BYTES));
            }
            1 => Refusal::Version { expected: version, found: VERSION },
            2 => Refusal::Group { found: hello.group.clone() },
            3 => Refusal::Incarnation,
            4 => Refusal::Size { expected: expected_number, found: hello.size },
            5 => Refusal::RankOutOfRange { rank: hello.rank, size: expected_number },
            6 => Refusal::DuplicateRank { rank: hello.rank },
            _ => return None,
        };
        Some((Self::Refused(refusal), 0))
    }

    /// Reads the table of a welcome.
    pub(super) fn parse_table(bytes: &[u8]) -> Option<Vec<SocketAddr>> {
        let mut fields = Fields(bytes);
        let mut table = Vec::with_capacity(bytes.len() / ADDRESS_BYTES);
        while let Some(address) = fields.take() {
            table.push(decode_address(address)?);
        }
        Some(table)
    }
}

/// Fields one after the other.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*field)
    }
}

/// Layout: family (4 or 6) u8, port u16, 16 bytes of address, of which a version 4 address takes the first four. Scopes
/// of link-local addresses mean nothing to another machine and are not sent.
fn encode_address(address: SocketAddr) -> [u8; ADDRESS_BYTES] {
    let mut bytes = [0; ADDRESS_BYTES];
    bytes[1..3].copy_from_slice(&address.port().to_le_bytes());
    match address.ip() {
        IpAddr::V4(ip) => {
            bytes[0] = 4;
            bytes[3..7].copy_from_slice(&ip.octets());
        }
        IpAddr::V6(ip) => {
            bytes[0] = 6;
            bytes[3..19].copy_from_slice(&ip.octets());
        }
    }
    bytes
}

fn decode_address(bytes: [u8; ADDRESS_BYTES]) -> Option<SocketAddr> {
    let mut fields = Fields(&bytes);
    let [family] = fields.take()?;
    let port = u16::from_le_bytes(fields.take()?);
    let ip: [u8; 16] = fields.take()?;
    let ip = match family {
        4 => IpAddr::V4(Ipv4Addr::new(ip[0], ip[1], ip[2], ip[3])),
        6 => IpAddr::V6(Ipv6Addr::from(ip)),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> Hello {
        Hello {
            purpose: Purpose::Register,
            rank: 2,
            size: 3,
            incarnation: 0x0123_4567_89ab_cdef,
            group: "réplica-0".to_owned(),
            listens_at: "10.1.2.3:4567".parse().unwrap(),
        }
    }

    #[test]
    fn a_hello_survives_the_wire_and_every_prefix_is_incomplete() {
        let mut six = hello();
        six.listens_at = "[fe80::1:2]:65535".parse().unwrap();
        for hello in [hello(), six] {
            let bytes = hello.encode();
            assert!((0..bytes.len()).all(|length| Hello::parse(&bytes[..length]) == Parsed::Incomplete));
            assert_eq!(Hello::parse(&bytes), Parsed::Hello(hello));
        }
    }

    #[test]
    fn strangers_are_told_apart() {
        assert_eq!(Hello::parse(b"GET / HTTP/1.1\r\n"), Parsed::Garbage);
        let mut bytes = hello().encode();
        bytes.push(0);
        assert_eq!(Hello::parse(&bytes), Parsed::Garbage);
        bytes[4] = 9;
        assert_eq!(Hello::parse(&bytes[..6]), Parsed::OtherVersion(9));
    }

    #[test]
    fn answers_survive_the_wire() {
        let hello = hello();
        let table: Vec<SocketAddr> = vec!["10.0.0.1:1".parse().unwrap(), "[::1]:2".parse().unwrap()];
        let bytes = Answer::Welcome(table.clone()).encode();
        let (fixed, rest) = bytes.split_first_chunk().unwrap();
        assert_eq!(Answer::parse(fixed, &hello), Some((Answer::Welcome(Vec::new()), rest.len())));
        assert_eq!(Answer::parse_table(rest), Some(table));

        for refusal in [
            Refusal::Group { found: hello.group.clone() },
            Refusal::Incarnation,
            Refusal::Size { expected: 4, found: 3 },
            Refusal::RankOutOfRange { rank: 2, size: 2 },
            Refusal::DuplicateRank { rank: 2 },
        ] {
            let bytes = Answer::Refused(refusal.clone()).encode();
            let fixed = bytes.first_chunk().unwrap();
            assert_eq!(Answer::parse(fixed, &hello), Some((Answer::Refused(refusal), 0)));
        }
    }

    #[test]
    fn a_table_of_another_length_and_an_echo_are_no_answer() {
        let welcome = Answer::Welcome(vec!["10.0.0.1:1".parse().unwrap()]).encode();
        assert_eq!(Answer::parse(welcome.first_chunk().unwrap(), &hello()), None);
        assert_eq!(Answer::parse(hello().encode().first_chunk().unwrap(), &hello()), None);
    }
}
