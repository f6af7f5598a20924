//! The header of a safetensors file: eight bytes of length, then JSON that places every tensor in the rest of the file.
//! Nothing in it is trusted: the tensors must tile the file exactly, without gap, overlap or remainder. Whether they are
//! the right tensors is checked elsewhere.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::{ModelError, Result};

/// Bytes of the length field.
const LENGTH_BYTES: usize = 8;
/// The format's own limit on the header.
const MAX_HEADER: u64 = 100_000_000;
/// The one key of the header that is no tensor.
const METADATA: &str = "__metadata__";

/// Where a tensor lies and what the file says it is.
#[derive(Debug)]
pub(super) struct Entry {
    /// Element type in the format's spelling ("BF16", "F32", ...).
    pub(super) dtype: String,
    /// Shape.
    pub(super) shape: Vec<usize>,
    /// Bytes of the file, within its length.
    pub(super) bytes: Range<usize>,
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

/// Reads the header of a file with these bytes; `path` is for errors.
///
/// # Errors
/// The file is shorter or longer than its header says, or the header is malformed or contradicts itself.
pub(super) fn read(path: &Path, file: &[u8]) -> Result<BTreeMap<String, Entry>> {
    let (header, data) = divide(path, file)?;
    let object: Map<String, Value> = serde_json::from_slice(header)
        .map_err(|error| ModelError::file(path, "a JSON object as header", error.to_string()))?;
    let first = file.len() - data.len();
    let mut entries = BTreeMap::new();
    for (name, value) in object {
        if name == METADATA {
            continue;
        }
        let raw = RawEntry::deserialize(&value).map_err(|error| {
            ModelError::file(path, format!("dtype, shape and data_offsets of tensor {name}"), error.to_string())
        })?;
        let (start, end) = raw.data_offsets;
        if start > end || end > data.len() {
            return Err(ModelError::file(
                path,
                format!("tensor {name} within the file's {} bytes of data", data.len()),
                format!("bytes {start} to {end}"),
            ));
        }
        let bytes = first + start..first + end;
        entries.insert(name, Entry { dtype: raw.dtype, shape: raw.shape, bytes });
    }
    check_tiling(path, &entries, first..file.len())?;
    Ok(entries)
}

/// Divides a file into header and data.
fn divide<'a>(path: &Path, file: &'a [u8]) -> Result<(&'a [u8], &'a [u8])> {
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(ModelError::file(
            path,
            format!("at least the {LENGTH_BYTES} bytes of a header length"),
            format!("{} bytes", file.len()),
        ));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(ModelError::file(
            path,
            format!("a header of at most {MAX_HEADER} bytes"),
            format!("{length} as its length"),
        ));
    }
    usize::try_from(length).ok().and_then(|length| rest.split_at_checked(length)).ok_or_else(|| {
        ModelError::file(path, format!("a header of {length} bytes"), format!("{} bytes after its length", rest.len()))
    })
}

/// Checks that the tensors, in the order of their places, follow each other and fill the data.
fn check_tiling(path: &Path, entries: &BTreeMap<String, Entry>, data: Range<usize>) -> Result<()> {
    let mut order: Vec<_> = entries.iter().collect();
    order.sort_by_key(|(_, entry)| (entry.bytes.start, entry.bytes.end));
    let mut next = data.start;
    for (name, entry) in order {
        if entry.bytes.start != next {
            return Err(ModelError::file(
                path,
                format!("tensor {name} at byte {} of the data, where the one before it ends", next - data.start),
                format!("byte {}", entry.bytes.start - data.start),
            ));
        }
        next = entry.bytes.end;
    }
    if next != data.end {
        return Err(ModelError::file(
            path,
            format!("{} bytes of data, where the last tensor ends", next - data.start),
            format!("{} bytes", data.len()),
        ));
    }
    Ok(())
}
