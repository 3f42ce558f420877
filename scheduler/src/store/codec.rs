//! How a revision lies in the log, and a value beside it: as JSON, compressed as a whole with a dictionary of what revisions look like.
//!
//! The old value of each change lies right before the new one, so that what stays as it was costs a few bytes
//! (zstd refers back to it), and the names of fields cost next to nothing (it refers to the dictionary). Each entry
//! can be read without any other, so that entries may be removed from either end. A checksum tells damage.
//!
//! # Layout
//! | byte | meaning |
//! | --- | --- |
//! | 0 | `{`: the whole is plain JSON, as the first stores had it. `1`: what follows is a zstd frame without its magic number, with the first [`DICTIONARY`] |

use std::{
    io,
    sync::{Mutex, OnceLock, PoisonError},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use zstd::{
    bulk::{Compressor, Decompressor},
    zstd_safe,
};

/// Never to be changed: what was written with it is read with it. A better one gets another first byte.
const DICTIONARY: &[u8] = include_bytes!("dictionary-1.json");
const DICTIONARY_1: u8 = 1;
const PLAIN: u8 = b'{';
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xB5, 0x2F, 0xFD];
/// zstd's default. Higher ones take more time, and entries as small as these get no smaller.
const LEVEL: i32 = 3;
/// The most bytes of JSON in one entry: a revision that touches every pod of the largest cluster fits.
const JSON_BYTES_MAX: u64 = 1 << 30;
/// What a decoder that is always there keeps of its buffers.
const BUFFER_BYTES_KEPT: usize = 1 << 20;

/// A revision or a value as it is stored.
pub(crate) fn encode(thing: &impl Serialize) -> Vec<u8> {
    static COMPRESSOR: OnceLock<Mutex<Compressor<'static>>> = OnceLock::new();
    let json = serde_json::to_vec(thing).expect("keys are text and no value can fail to be written");
    let mut compressor = COMPRESSOR.get_or_init(|| Mutex::new(compressor())).lock();
    let compressor = compressor.as_mut().unwrap_or_else(|poisoned| poisoned.get_mut());
    let frame = compressor.compress(&json).expect("the output has room for the worst case");
    [&[DICTIONARY_1], &frame[ZSTD_MAGIC.len()..]].concat()
}

/// Reads what [`encode`] wrote, and what the first stores wrote.
///
/// # Errors
/// It is not what was written.
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    static DECODER: OnceLock<Mutex<Decoder>> = OnceLock::new();
    let decoder = DECODER.get_or_init(|| Mutex::new(Decoder::new()));
    let mut decoder = decoder.lock().unwrap_or_else(PoisonError::into_inner);
    let read = decoder.json(bytes).and_then(parse);
    decoder.shrink();
    read
}

/// What [`Decoder::json`] gave, as a value.
///
/// # Errors
/// It is not one.
pub(crate) fn parse<'a, T: Deserialize<'a>>(json: &'a [u8]) -> io::Result<T> {
    serde_json::from_slice(json).map_err(|error| damaged(error.to_string()))
}

/// Reads many, one after the other: a thread that does so has one of its own.
pub(crate) struct Decoder {
    decompressor: Decompressor<'static>,
    frame: Vec<u8>,
    json: Vec<u8>,
}

impl Decoder {
    pub(crate) fn new() -> Decoder {
        let decompressor = Decompressor::with_dictionary(DICTIONARY).expect("the dictionary is a constant");
        Decoder { decompressor, frame: ZSTD_MAGIC.to_vec(), json: Vec::new() }
    }

    /// The JSON of a revision or a value, until the next is read.
    ///
    /// # Errors
    /// It is not what was written.
    pub(crate) fn json<'a>(&'a mut self, bytes: &'a [u8]) -> io::Result<&'a [u8]> {
        match bytes.first() {
            Some(&PLAIN) => Ok(bytes),
            Some(&DICTIONARY_1) => self.decompress(&bytes[1..]),
            Some(other) => Err(damaged(format!("an entry of kind {other}"))),
            None => Err(damaged("an empty entry".to_owned())),
        }
    }

    fn decompress(&mut self, frame: &[u8]) -> io::Result<&[u8]> {
        self.frame.truncate(ZSTD_MAGIC.len());
        self.frame.extend_from_slice(frame);
        let len = zstd_safe::get_frame_content_size(&self.frame).ok().flatten();
        let len = len.filter(|len| *len <= JSON_BYTES_MAX).ok_or_else(|| damaged("no length".to_owned()))?;
        self.json.clear();
        self.json.reserve(len as usize);
        let done = self.decompressor.decompress_to_buffer(&self.frame, &mut self.json);
        done.map_err(|error| damaged(error.to_string()))?;
        Ok(&self.json)
    }

    /// Gives back what a large one took.
    fn shrink(&mut self) {
        self.frame.shrink_to(BUFFER_BYTES_KEPT);
        self.json.shrink_to(BUFFER_BYTES_KEPT);
    }
}

fn compressor() -> Compressor<'static> {
    let made = Compressor::with_dictionary(LEVEL, DICTIONARY).and_then(|mut compressor| {
        compressor.include_checksum(true)?;
        Ok(compressor)
    });
    made.expect("the dictionary and the level are constants that zstd takes")
}

fn damaged(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use scheduler_core::{
        change::{Change, Key, Revision, Value},
        cluster::Counters,
        time::WallTime,
    };

    use super::*;

    fn revision(message: &str) -> Revision {
        let value = |pods_made| Some(Value::Counters(Counters { pods_made, restored_from: 0 }));
        let change = Change { key: Key::Counters, old: value(1), new: value(2) };
        let (changer, message) = ("user:root".to_owned(), message.to_owned());
        Revision { revision: 7, time: WallTime(1_795_265_640_999), changer, message, changes: vec![change] }
    }

    #[test]
    fn entries_read_back_as_they_were_also_those_of_the_first_stores() {
        for message in ["", "job web version 1 applied", &"long ".repeat(100_000)] {
            let revision = revision(message);
            assert_eq!(decode::<Revision>(&encode(&revision)).unwrap(), revision);
            assert_eq!(decode::<Revision>(&serde_json::to_vec(&revision).unwrap()).unwrap(), revision);
        }
    }

    #[test]
    fn an_entry_is_a_third_of_its_json_or_less() {
        let revision = revision("a message that nobody has seen");
        let (entry, json) = (encode(&revision).len(), serde_json::to_vec(&revision).unwrap().len());
        assert!(entry * 3 < json, "{entry} bytes for {json}");
    }

    #[test]
    fn every_damaged_byte_is_found() {
        let revision = revision("a message that nobody has seen");
        let good = encode(&revision);
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= 0x10;
            // zstd has a bit that means nothing.
            if let Ok(read) = decode::<Revision>(&bytes) {
                assert_eq!(read, revision, "byte {at}");
            }
            assert!(decode::<Revision>(&good[..at]).is_err(), "cut off at {at}");
        }
    }
}
