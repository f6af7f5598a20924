//! Numbers to little-endian bytes and back, and the two reductions over received bytes. Every rank runs the same code
//! over the same bytes, its own contribution included, so that sums agree bit for bit; nothing here knows about ranks.

/// Appends `values` to `bytes`.
pub(crate) fn append_floats(bytes: &mut Vec<u8>, values: &[f32]) {
    let start = bytes.len();
    bytes.resize(start + size_of_val(values), 0);
    for (target, value) in bytes[start..].chunks_exact_mut(4).zip(values) {
        target.copy_from_slice(&value.to_le_bytes());
    }
}

/// Appends `words` to `bytes`.
pub(crate) fn append_words(bytes: &mut Vec<u8>, words: &[u64]) {
    bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
}

/// Overwrites `values` with the floats in `bytes`, which has four bytes for each.
pub(crate) fn read_floats(values: &mut [f32], bytes: &[u8]) {
    for (value, float) in values.iter_mut().zip(floats(bytes)) {
        *value = float;
    }
}

/// Adds the floats in `bytes` to `values`.
pub(crate) fn add_floats(values: &mut [f32], bytes: &[u8]) {
    for (value, float) in values.iter_mut().zip(floats(bytes)) {
        *value += float;
    }
}

/// ORs the words in `bytes` into `words`.
pub(crate) fn or_words(words: &mut [u64], bytes: &[u8]) {
    let received = bytes.chunks_exact(8).map(|b| u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]));
    for (word, other) in words.iter_mut().zip(received) {
        *word |= other;
    }
}

fn floats(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}
