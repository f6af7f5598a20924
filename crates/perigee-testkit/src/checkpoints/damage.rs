//! Copies of a checkpoint and edits of the copy: configuration keys, a weight file's header, and its bytes.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Result, TestkitError};

/// Bytes before a safetensors header: its length.
const LENGTH_BYTES: usize = 8;

/// Copies a checkpoint's files, expected outputs left out.
///
/// # Errors
/// A file cannot be read or written.
pub fn copy(from: &Path, to: &Path) -> Result<Editable> {
    std::fs::create_dir_all(to).map_err(TestkitError::file(to))?;
    for entry in std::fs::read_dir(from).map_err(TestkitError::file(from))? {
        let path = entry.map_err(TestkitError::file(from))?.path();
        let Some(name) = path.file_name().filter(|name| *name != "expected.safetensors") else { continue };
        let target = to.join(name);
        std::fs::copy(&path, &target).map_err(TestkitError::file(&target))?;
    }
    Ok(Editable { directory: to.to_owned() })
}

/// A checkpoint directory that may be broken.
#[derive(Debug, Clone)]
pub struct Editable {
    /// Where it is.
    pub directory: PathBuf,
}

impl Editable {
    /// Changes config.json.
    ///
    /// # Errors
    /// The file cannot be read or written, or is not JSON.
    pub fn config(&self, edit: impl FnOnce(&mut Value)) -> Result<()> {
        let path = self.directory.join("config.json");
        let mut document = serde_json::from_slice(&self.read("config.json")?)?;
        edit(&mut document);
        std::fs::write(&path, serde_json::to_vec(&document)?).map_err(TestkitError::file(path))
    }

    /// Changes the entries of a weight file's header; the bytes behind it stay as they are.
    ///
    /// # Errors
    /// The file cannot be read or written, or has no header.
    pub fn header(&self, file: &str, edit: impl FnOnce(&mut Map<String, Value>)) -> Result<()> {
        self.bytes(file, |bytes| {
            let (mut header, data) = split(bytes)?;
            edit(&mut header);
            let mut text = Value::Object(header).to_string().into_bytes();
            text.resize(text.len().next_multiple_of(LENGTH_BYTES), b' ');
            Ok([&(text.len() as u64).to_le_bytes(), text.as_slice(), data].concat())
        })
    }

    /// Changes a file's bytes.
    ///
    /// # Errors
    /// The file cannot be read or written, or the edit fails.
    pub fn bytes(&self, file: &str, edit: impl FnOnce(&[u8]) -> Result<Vec<u8>>) -> Result<()> {
        let path = self.directory.join(file);
        let bytes = edit(&self.read(file)?)?;
        std::fs::write(&path, bytes).map_err(TestkitError::file(path))
    }

    fn read(&self, file: &str) -> Result<Vec<u8>> {
        let path = self.directory.join(file);
        std::fs::read(&path).map_err(TestkitError::file(path))
    }
}

fn split(bytes: &[u8]) -> Result<(Map<String, Value>, &[u8])> {
    let short = || TestkitError::Safetensors("shorter than its header".into());
    let (length, rest) = bytes.split_first_chunk::<LENGTH_BYTES>().ok_or_else(short)?;
    let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| short())?;
    let (text, data) = rest.split_at_checked(length).ok_or_else(short)?;
    Ok((serde_json::from_slice(text)?, data))
}
