//! Reads a redb file page by page and checks every page against the checksum that its parent holds.
//!
//! redb itself checks pages only when it repairs a file, and then goes back to an older commit. Here nothing is
//! written and nothing is gone back to: what passes is what was committed last, and of the rest it is known
//! between which keys it lay. It is not a way to read a good file.
//!
//! # Layout
//! | what | where |
//! | --- | --- |
//! | header | 64 bytes: magic number, flags, size of a page, of a region |
//! | two commit slots | 128 bytes each: roots of the trees of tables, number of the transaction, checksum |
//! | pages | regions of `header pages + data pages`, after the first page |
//!
//! # Source
//! docs/design.md of redb, file format 3.

use std::{io, ops::Range};

use twox_hash::XxHash3_128;

use page::{Children, Page, u32_at, u64_at, u128_at};

mod page;

const MAGIC: &[u8] = b"redb\x1A\x0A\xA9\x0D\x0A";
const HEADER_LEN: usize = 64 + 2 * SLOT_LEN;
const SLOT_LEN: usize = 128;
const SLOT_VERSION: u8 = 3;
const FLAG_PRIMARY: u8 = 1;
const FLAG_UNCLEAN: u8 = 2;
const FLAG_TWO_PHASE: u8 = 4;
/// The number of a page, its checksum, and how many entries are below it.
const ROOT_LEN: usize = 8 + 16 + 8;
/// No real tree is as deep; a damaged one may be a ring.
const DEPTH_MAX: usize = 128;
/// A page of 4 KiB times 2^20: more than any value takes.
const ORDER_MAX: u64 = 20;

/// The bytes of a file.
#[expect(clippy::len_without_is_empty, reason = "a file that is empty has no header")]
pub trait Bytes {
    /// How many there are.
    ///
    /// # Errors
    /// The file cannot be asked.
    fn len(&self) -> io::Result<u64>;
    /// Fills `out` with those from `offset` on.
    ///
    /// # Errors
    /// They cannot be read, or there are not so many.
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()>;
}

impl Bytes for std::fs::File {
    fn len(&self) -> io::Result<u64> {
        self.metadata().map(|file| file.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, out, offset)
    }
}

/// A part of a table that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hole {
    /// The table's name: the tree of tables itself has none.
    pub table: Option<String>,
    /// Keys greater than this one; from the first on when it is not there.
    pub after: Option<Vec<u8>>,
    /// And none greater than this one.
    pub up_to: Option<Vec<u8>>,
    /// Where the page begins in the file.
    pub at: u64,
    /// What is wrong with it.
    pub why: String,
}

/// A table, and where its tree begins.
pub struct Table {
    /// Its name.
    pub name: String,
    /// How many entries it has, those that cannot be read among them.
    pub len: u64,
    root: Option<Root>,
    widths: Widths,
}

/// The widths of keys and values that all have the same.
#[derive(Clone, Copy, Debug, Default)]
struct Widths {
    key: Option<usize>,
    value: Option<usize>,
}

#[derive(Clone, Copy, Debug)]
struct Root {
    page: u64,
    checksum: u128,
}

/// Takes an entry of a table.
pub type Each<'a> = dyn FnMut(&[u8], &[u8]) + 'a;

/// A file whose header is good.
pub struct Pages<'a> {
    bytes: &'a dyn Bytes,
    len: u64,
    page_len: u64,
    region_header_pages: u64,
    region_pages: u64,
    slot: [u8; SLOT_LEN],
    flaw: Option<String>,
}

impl<'a> Pages<'a> {
    /// Reads the header.
    ///
    /// # Errors
    /// What is wrong with it: without it nothing can be found.
    pub fn open(bytes: &'a dyn Bytes) -> Result<Pages<'a>, String> {
        let mut header = [0; HEADER_LEN];
        let len = bytes.len().map_err(|error| error.to_string())?;
        if len < HEADER_LEN as u64 {
            return Err("it ends within its header".to_owned());
        }
        bytes.read(0, &mut header).map_err(|error| format!("the header: {error}"))?;
        if !header.starts_with(MAGIC) {
            return Err("it does not begin as a redb file".to_owned());
        }
        let [page_len, region_header_pages, region_pages] =
            [12, 16, 20].map(|at| u64::from(u32_at(&header, at).unwrap_or_default()));
        if page_len != 4096 || region_header_pages > 1 << 20 || !(1..=1 << 20).contains(&region_pages) {
            return Err("the header says sizes that cannot be".to_owned());
        }
        let Chosen { slot, flaw } = choose(&header)?;
        Ok(Pages { bytes, len, page_len, region_header_pages, region_pages, slot, flaw })
    }

    /// What is wrong with the header although all of it is known.
    pub fn flaw(&self) -> Option<&str> {
        self.flaw.as_deref()
    }

    /// The tables of users, and what redb keeps for itself.
    pub fn tables(&self, holes: &mut Vec<Hole>) -> Vec<Table> {
        let mut tables = Vec::new();
        for (non_null, at) in [(1, 8), (2, 8 + ROOT_LEN)] {
            let root = Root::at(&self.slot, at).filter(|_| self.slot[non_null] != 0);
            let mut broken = Vec::new();
            self.tree(None, Widths::default(), root, holes, &mut |name, definition| {
                let name = String::from_utf8_lossy(name).into_owned();
                match Table::of(name.clone(), definition) {
                    Some(table) => tables.push(table),
                    None => broken.push(name),
                }
            });
            holes.extend(broken.into_iter().map(|name| Hole {
                why: "its place in the list of tables does not read".to_owned(),
                table: Some(name),
                after: None,
                up_to: None,
                at: 0,
            }));
        }
        tables
    }

    /// Gives the entries of a table in order, and what lies between those that cannot be read.
    pub fn entries(&self, table: &Table, holes: &mut Vec<Hole>, each: &mut Each<'_>) {
        self.tree(Some(&table.name), table.widths, table.root, holes, each);
    }

    fn tree(
        &self,
        table: Option<&str>,
        widths: Widths,
        root: Option<Root>,
        holes: &mut Vec<Hole>,
        each: &mut Each<'_>,
    ) {
        let mut walk = Walk { pages: self, table, widths, holes, each };
        if let Some(root) = root {
            walk.descend(root, None, None, 0);
        }
    }

    fn place(&self, number: u64) -> Result<Range<u64>, String> {
        let order = number >> 59;
        if order > ORDER_MAX {
            return Err("no page has such a number".to_owned());
        }
        let (index, region) = (number & (0xF_FFFF >> order), (number >> 20) & 0xF_FFFF);
        let region_len = (self.region_header_pages + self.region_pages) * self.page_len;
        let len = self.page_len << order;
        let start = self.page_len * (1 + self.region_header_pages) + region * region_len + index * len;
        Ok(start..start + len)
    }

    fn page(&self, root: Root, widths: Widths) -> Result<Page, (u64, String)> {
        let place = self.place(root.page).map_err(|why| (0, why))?;
        let failed = |why: String| (place.start, why);
        if place.end > self.len {
            return Err(failed("it lies behind the end of the file".to_owned()));
        }
        let mut bytes = vec![0; (place.end - place.start) as usize];
        self.bytes.read(place.start, &mut bytes).map_err(|error| failed(error.to_string()))?;
        let page = Page::of(bytes, widths.key, widths.value);
        page.filter(|page| XxHash3_128::oneshot(page.covered()) == root.checksum)
            .ok_or_else(|| failed("its checksum is wrong".to_owned()))
    }
}

impl Hole {
    /// What is wrong, and what is lost with it; `key` says a key in words.
    pub fn text(&self, key: impl Fn(&[u8]) -> String) -> String {
        let table = self.table.as_deref().unwrap_or("the list of tables");
        let end = |end: &Option<Vec<u8>>, none: &str| end.as_deref().map_or_else(|| none.to_owned(), &key);
        format!(
            "{table}: the page at byte {} cannot be read ({}): it holds what comes after {} up to {}",
            self.at,
            self.why,
            end(&self.after, "the beginning"),
            end(&self.up_to, "the end")
        )
    }
}

/// The slot of the last commit, and what was wrong with it.
struct Chosen {
    slot: [u8; SLOT_LEN],
    flaw: Option<String>,
}

/// The slot of the last commit.
fn choose(header: &[u8]) -> Result<Chosen, String> {
    let flags = header[9];
    let known = FLAG_PRIMARY | FLAG_UNCLEAN | FLAG_TWO_PHASE;
    if flags & !known != 0 {
        return Err(format!("the header's flags are {flags:#x}"));
    }
    let slot = |number: usize| -> [u8; SLOT_LEN] {
        let at = 64 + number * SLOT_LEN;
        header[at..at + SLOT_LEN].try_into().expect("the header holds two slots")
    };
    let primary = usize::from(flags & FLAG_PRIMARY);
    let (first, second) = (slot(primary), slot(primary ^ 1));
    let newer = is_good(&second) && u64_at(&second, 104) > u64_at(&first, 104);
    let as_it_is = |slot| Ok(Chosen { slot, flaw: None });
    match (is_good(&first), flags & FLAG_UNCLEAN != 0, flags & FLAG_TWO_PHASE != 0) {
        // A cut of the power while the next commit was written: that is not there yet.
        (true, true, true) => as_it_is(first),
        (true, false, _) if newer => Err("the header points to a commit that is not the last".to_owned()),
        (true, true, false) if newer => as_it_is(second),
        (true, ..) => as_it_is(first),
        (false, true, false) if is_good(&second) => as_it_is(second),
        (false, ..) => {
            mended(first).ok_or_else(|| "the header's commit slot does not have its checksum".to_owned())
        }
    }
}

/// A slot in which one bit is another than was written: of all that differ from it by one bit only that one has its
/// checksum, which has 128. The slot beside it is good, too, and of the commit before: what it leads to is not the last that
/// was written.
fn mended(slot: [u8; SLOT_LEN]) -> Option<Chosen> {
    let flipped = |bit: usize| {
        let mut other = slot;
        other[bit / 8] ^= 1 << (bit % 8);
        other
    };
    let (bit, slot) = (0..SLOT_LEN * 8).map(|bit| (bit, flipped(bit))).find(|(_, other)| is_good(other))?;
    let flaw = format!("the header: bit {} of byte {} of the last commit's slot is wrong", bit % 8, bit / 8);
    Some(Chosen { slot, flaw: Some(flaw) })
}

fn is_good(slot: &[u8; SLOT_LEN]) -> bool {
    let end = SLOT_LEN - 16;
    slot[0] == SLOT_VERSION && u128_at(slot, end) == Some(XxHash3_128::oneshot(&slot[..end]))
}

impl Root {
    fn at(bytes: &[u8], at: usize) -> Option<Root> {
        Some(Root { page: u64_at(bytes, at)?, checksum: u128_at(bytes, at + 8)? })
    }
}

impl Table {
    fn of(name: String, definition: &[u8]) -> Option<Table> {
        const NORMAL: u8 = 3;
        let width =
            |at: usize| Some(Some(u32_at(definition, at + 1)? as usize).filter(|_| definition[at] != 0));
        let root = Root::at(definition, 10)?;
        let root = Some(root).filter(|_| definition[9] != 0);
        let widths = Widths { key: width(10 + ROOT_LEN)?, value: width(15 + ROOT_LEN)? };
        (definition[0] == NORMAL).then_some(Table { name, len: u64_at(definition, 1)?, root, widths })
    }
}

struct Walk<'a> {
    pages: &'a Pages<'a>,
    table: Option<&'a str>,
    widths: Widths,
    holes: &'a mut Vec<Hole>,
    each: &'a mut Each<'a>,
}

impl Walk<'_> {
    fn descend(&mut self, root: Root, after: Option<&[u8]>, up_to: Option<&[u8]>, depth: usize) {
        let read = match depth {
            DEPTH_MAX => Err((0, "the pages point at each other".to_owned())),
            _ => self.pages.page(root, self.widths),
        };
        match read {
            Ok(page) => self.show(&page, after, up_to, depth),
            Err((at, why)) => {
                let (after, up_to) = (after.map(<[u8]>::to_vec), up_to.map(<[u8]>::to_vec));
                let table = self.table.map(str::to_owned);
                self.holes.push(Hole { table, after, up_to, at, why });
            }
        }
    }

    fn show(&mut self, page: &Page, after: Option<&[u8]>, up_to: Option<&[u8]>, depth: usize) {
        match page.children() {
            Children::Entries(entries) => {
                entries.into_iter().for_each(|(key, value)| (self.each)(key, value))
            }
            Children::Pages(pages) => {
                let mut before = after;
                for below in pages {
                    let root = Root { page: below.page, checksum: below.checksum };
                    self.descend(root, before, below.last.or(up_to), depth + 1);
                    before = below.last;
                }
            }
        }
    }
}
