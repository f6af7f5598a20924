//! Files mapped into memory, read-only: the one place in this crate with unsafe code. It knows nothing of what the files
//! hold.

use std::fs::File;
use std::ops::Deref;
use std::path::Path;

use memmap2::{Mmap, MmapOptions};

use crate::error::{ModelError, Result};

/// A whole file as bytes; pages are read when they are touched and shared with other processes that map the file.
#[derive(Debug)]
pub(super) struct FileMap(Option<Mmap>);

impl FileMap {
    /// Maps a regular file.
    ///
    /// # Errors
    /// The file cannot be opened or mapped, or is something else than a regular file.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(ModelError::io("open", path))?;
        let metadata = file.metadata().map_err(ModelError::io("read", path))?;
        if !metadata.is_file() {
            return Err(ModelError::file(path, "a regular file", "something else"));
        }
        if metadata.len() == 0 {
            // The system call refuses empty maps.
            return Ok(Self(None));
        }
        map(&file).map(|map| Self(Some(map))).map_err(ModelError::io("map", path))
    }
}

impl Deref for FileMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }
}

#[expect(unsafe_code, reason = "the one memory map of the project: a 98 GB checkpoint cannot be read into every rank")]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: a map is sound as long as nobody changes or truncates the file below it. This process opens the file for
    // reading only and makes a private read-only map, so it cannot. Other processes must not: checkpoint files are
    // written under another name and renamed when complete (as this crate's own writer does), and replacing a file by
    // renaming leaves the mapped one intact; the operator keeps to that for a model directory in use. Should a file be
    // truncated all the same, the process ends with SIGBUS, and its replica is restarted like any that crashed.
    // No reference into the map outlives it, because all of them borrow from `FileMap`. Bytes have no invalid values.
    unsafe { MmapOptions::new().map_copy_read_only(file) }
}
