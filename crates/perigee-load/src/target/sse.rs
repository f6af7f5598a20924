//! Server-sent events, as far as token streams use them: the data of each event, from bytes in any pieces.

/// Collects bytes and gives out the data of complete events.
#[derive(Debug, Default)]
pub(super) struct Events {
    /// The line that is not complete yet.
    line: Vec<u8>,
    /// Data of the event that is not complete yet.
    data: Option<String>,
}

impl Events {
    /// Takes in bytes; `each` gets the data of every event that they complete.
    pub(super) fn push<E>(&mut self, bytes: &[u8], mut each: impl FnMut(&str) -> Result<(), E>) -> Result<(), E> {
        let mut parts = bytes.split(|byte| *byte == b'\n').peekable();
        while let Some(part) = parts.next() {
            self.line.extend_from_slice(part);
            // What follows the last line break is the beginning of a line.
            if parts.peek().is_none() {
                break;
            }
            let line = std::mem::take(&mut self.line);
            let line = String::from_utf8_lossy(line.strip_suffix(b"\r").unwrap_or(&line)).into_owned();
            if line.is_empty() {
                if let Some(data) = self.data.take() {
                    each(&data)?;
                }
            } else if let Some(value) = line.strip_prefix("data:") {
                let value = value.strip_prefix(' ').unwrap_or(value);
                match &mut self.data {
                    Some(data) => {
                        data.push('\n');
                        data.push_str(value);
                    }
                    None => self.data = Some(value.to_owned()),
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_the_same_however_their_bytes_are_cut() {
        let stream = ": hello\r\n\r\ndata: {\"a\": \"ü\"}\r\n\r\nevent: x\nid: 7\ndata:one\ndata: two\n\n\n\ndata: [DONE]\n\ndata: lost";
        for size in 1..stream.len() {
            let (mut events, mut found) = (Events::default(), Vec::new());
            for bytes in stream.as_bytes().chunks(size) {
                let pushed = events.push(bytes, |data| {
                    found.push(data.to_owned());
                    Ok::<(), ()>(())
                });
                assert_eq!(pushed, Ok(()));
            }
            assert_eq!(found, ["{\"a\": \"ü\"}", "one\ntwo", "[DONE]"], "pieces of {size}");
        }
    }
}
