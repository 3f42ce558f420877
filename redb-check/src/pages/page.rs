//! One page of a tree: a leaf with entries, or a branch with pages below it.
//!
//! # Layout
//! Numbers are little endian.
//!
//! | byte | leaf | branch |
//! | --- | --- | --- |
//! | 0 | 1 | 2 |
//! | 2 | entries, 16 bits | keys, 16 bits; one more page |
//! | 4 | end of each key, of each value (32 bits; none where the width is fixed) | padding |
//! | 8 | | checksum of each page (128 bits), its number (64 bits), end of each key |
//! | then | keys, values | keys |

const LEAF: u8 = 1;
const BRANCH: u8 = 2;

/// A page whose offsets stay within it. Its checksum is the caller's to look at.
pub(super) struct Page {
    bytes: Vec<u8>,
    is_leaf: bool,
    /// Where each key and value begins, and where the last one ends.
    keys: Vec<usize>,
    values: Vec<usize>,
}

/// What a page holds.
pub(super) enum Children<'a> {
    /// Keys and values.
    Entries(Vec<(&'a [u8], &'a [u8])>),
    /// Pages.
    Pages(Vec<Below<'a>>),
}

/// A page below a branch.
pub(super) struct Below<'a> {
    pub(super) page: u64,
    pub(super) checksum: u128,
    /// The greatest key that may be in it, but for the last page.
    pub(super) last: Option<&'a [u8]>,
}

impl Page {
    /// `None` when this cannot be a page.
    pub(super) fn of(bytes: Vec<u8>, key_width: Option<usize>, value_width: Option<usize>) -> Option<Page> {
        let count = usize::from(u16::from_le_bytes(bytes.get(2..4)?.try_into().ok()?));
        let is_leaf = match bytes[0] {
            LEAF => true,
            BRANCH => false,
            _ => return None,
        };
        let ends = |width: Option<usize>| if width.is_none() { 4 * count } else { 0 };
        let (key_ends, value_ends) = match is_leaf {
            true => (4, 4 + ends(key_width)),
            false => (8 + 24 * (count + 1), 0),
        };
        let begin = if is_leaf { value_ends + ends(value_width) } else { key_ends + ends(key_width) };
        let keys = offsets(&bytes, begin, key_ends, count, key_width)?;
        let values = match is_leaf {
            true => offsets(&bytes, *keys.last()?, value_ends, count, value_width)?,
            false => Vec::new(),
        };
        (count > 0).then_some(Page { bytes, is_leaf, keys, values })
    }

    /// The bytes that the checksum is of.
    pub(super) fn covered(&self) -> &[u8] {
        let ends = if self.is_leaf { &self.values } else { &self.keys };
        &self.bytes[..ends.last().copied().unwrap_or_default()]
    }

    pub(super) fn children(&self) -> Children<'_> {
        let part = |window: &[usize]| &self.bytes[window[0]..window[1]];
        if self.is_leaf {
            let pairs = self.keys.windows(2).zip(self.values.windows(2));
            return Children::Entries(pairs.map(|(key, value)| (part(key), part(value))).collect());
        }
        let count = self.keys.len();
        let below = |number: usize| {
            let checksum = u128_at(&self.bytes, 8 + 16 * number)?;
            let page = u64_at(&self.bytes, 8 + 16 * count + 8 * number)?;
            Some(Below { page, checksum, last: self.keys.get(number..number + 2).map(part) })
        };
        Children::Pages((0..count).filter_map(below).collect())
    }
}

/// Where each of `count` things begins, and where the last one ends.
fn offsets(
    bytes: &[u8],
    begin: usize,
    ends: usize,
    count: usize,
    width: Option<usize>,
) -> Option<Vec<usize>> {
    let mut offsets = vec![begin];
    for number in 0..count {
        let end = match width {
            Some(width) => begin + width * (number + 1),
            None => u32_at(bytes, ends + 4 * number)? as usize,
        };
        if end < *offsets.last()? || end > bytes.len() {
            return None;
        }
        offsets.push(end);
    }
    Some(offsets)
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

pub(super) fn u128_at(bytes: &[u8], at: usize) -> Option<u128> {
    Some(u128::from_le_bytes(bytes.get(at..at + 16)?.try_into().ok()?))
}
