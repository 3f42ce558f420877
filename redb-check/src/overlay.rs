//! A file that redb may open and repair as it likes: what it writes stays in memory.

use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    sync::{Mutex, MutexGuard, PoisonError},
};

use redb::StorageBackend;

const BLOCK: u64 = 4096;

/// The blocks that were written, over a file that is only read.
pub struct Overlay {
    file: File,
    written: Mutex<Written>,
}

struct Written {
    len: u64,
    /// How much of the file counts: it may have been made shorter.
    file_len: u64,
    blocks: BTreeMap<u64, Box<[u8; BLOCK as usize]>>,
}

impl Overlay {
    /// Nothing is written yet.
    ///
    /// # Errors
    /// The file cannot be asked for its length.
    pub fn new(file: File) -> io::Result<Overlay> {
        let len = file.metadata()?.len();
        Ok(Overlay { file, written: Mutex::new(Written { len, file_len: len, blocks: BTreeMap::new() }) })
    }

    fn lock(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A block as it is now.
    fn block(&self, written: &Written, number: u64) -> io::Result<Box<[u8; BLOCK as usize]>> {
        if let Some(block) = written.blocks.get(&number) {
            return Ok(block.clone());
        }
        let mut block = Box::new([0; BLOCK as usize]);
        let start = number * BLOCK;
        let len = written.file_len.saturating_sub(start).min(BLOCK) as usize;
        self.file.read_exact_at(&mut block[..len], start)?;
        Ok(block)
    }

    /// The parts of blocks that these bytes are in: number, and where in the block and in the bytes.
    fn parts(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let here = offset + at as u64;
            let begin = (here % BLOCK) as usize;
            let end = (at + BLOCK as usize - begin).min(len);
            let part = at..end;
            at = end;
            (!part.is_empty()).then_some((here / BLOCK, begin, part))
        })
    }
}

impl fmt::Debug for Overlay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Overlay")
    }
}

impl StorageBackend for Overlay {
    fn len(&self) -> io::Result<u64> {
        Ok(self.lock().len)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let written = self.lock();
        if offset.saturating_add(out.len() as u64) > written.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (number, begin, part) in Overlay::parts(offset, out.len()) {
            let block = self.block(&written, number)?;
            out[part.clone()].copy_from_slice(&block[begin..begin + part.len()]);
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut written = self.lock();
        written.len = len;
        written.file_len = written.file_len.min(len);
        written.blocks.retain(|number, _| number * BLOCK < len);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut written = self.lock();
        for (number, begin, part) in Overlay::parts(offset, data.len()) {
            let mut block = self.block(&written, number)?;
            block[begin..begin + part.len()].copy_from_slice(&data[part]);
            written.blocks.insert(number, block);
        }
        Ok(())
    }
}
