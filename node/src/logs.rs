//! Reads what a task wrote, from its last lines on, and follows it while it grows.
//!
//! The log is two files at most, the current one and the one before (`supervisor::rotated`). Following sleeps on
//! inotify; nothing polls.

use std::{
    fmt,
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    str::FromStr,
    time::UNIX_EPOCH,
};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::{net::unix::pipe, sync::mpsc};

use crate::supervisor::rotated;

/// The most bytes of one chunk.
pub(crate) const CHUNK_BYTES_MAX: usize = 64 * 1024;

/// Room for some events; one needs `NAME_MAX` and 17 bytes at most.
const EVENTS_BYTES: usize = 4096;

/// A part of a log and where it ends, or why there is no more.
pub(crate) type Chunk = Result<(Vec<u8>, Position), String>;

/// A place in a log: how far into which of its files. A file is told by its inode and by when it was made, as the inode of one
/// that is no more may be given again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Position {
    inode: u64,
    made_ns: u128,
    offset: u64,
}

/// What to read.
#[derive(Clone, Debug)]
pub(crate) struct Selection {
    pub(crate) log: PathBuf,
    /// 0: all that is kept.
    pub(crate) tail_lines: u32,
    /// Go on until the pod is gone or nobody reads.
    pub(crate) follow: bool,
    /// Begin here, and not with the last lines.
    pub(crate) after: Option<Position>,
}

/// Why a log cannot be sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LogError {
    #[error("cannot read the log")]
    Read(#[from] io::Error),
    #[error(
        "what was written meanwhile is lost in part: the log was moved away more than once; `netctl logs` shows what is kept"
    )]
    Lost,
}

/// Sends the selected part of a log in chunks; returns at its end, or when nobody reads any more.
///
/// # Errors
/// When a file cannot be read, or is not there any more. A task that has not written anything has an empty log.
pub(crate) async fn read(selection: Selection, chunks: &mpsc::Sender<Chunk>) -> Result<(), LogError> {
    // Watched before it is read: what is written in between is not missed.
    let watch = selection.follow.then(|| FolderWatch::new(&selection.log)).transpose()?;
    let mut current = open(&selection.log)?;
    match (selection.after, &mut current) {
        (Some(after), current) => go_on(&selection.log, after, current, chunks).await?,
        (None, Some(file)) => send_tail(&selection, file, chunks).await?,
        (None, None) => {}
    }
    let Some(watch) = watch else { return Ok(()) };
    while !chunks.is_closed() {
        tokio::select! {
            there = watch.changed() => if !there? { return Ok(()) },
            () = chunks.closed() => return Ok(()),
        }
        catch_up(&selection.log, &mut current, chunks).await?;
    }
    Ok(())
}

/// Sends what was written after a place, which may be in the file before the current one by now.
async fn go_on(
    log: &Path,
    after: Position,
    current: &mut Option<File>,
    chunks: &mpsc::Sender<Chunk>,
) -> Result<(), LogError> {
    if after == Position::default() {
        // There was no file then: whatever there is came since.
        return send_all(open(&rotated(log))?, current, chunks).await;
    }
    if let Some(file) = current
        && seek(file, after)?
    {
        return Ok(send_rest(file, chunks).await?);
    }
    let mut before = open(&rotated(log))?.ok_or(LogError::Lost)?;
    if !seek(&mut before, after)? {
        return Err(LogError::Lost);
    }
    send_all(Some(before), current, chunks).await
}

/// Goes to the place, if it is in this file.
fn seek(file: &mut File, to: Position) -> io::Result<bool> {
    let (here, len) = (Position::in_file(file)?, file.metadata()?.len());
    let is_here = (here.inode, here.made_ns) == (to.inode, to.made_ns) && to.offset <= len;
    if is_here {
        file.seek(SeekFrom::Start(to.offset))?;
    }
    Ok(is_here)
}

async fn send_all(
    mut before: Option<File>,
    current: &mut Option<File>,
    chunks: &mpsc::Sender<Chunk>,
) -> Result<(), LogError> {
    for file in [before.as_mut(), current.as_mut()].into_iter().flatten() {
        send_rest(file, chunks).await?;
    }
    Ok(())
}

async fn send_tail(selection: &Selection, file: &mut File, chunks: &mpsc::Sender<Chunk>) -> io::Result<()> {
    let mut before = open(&rotated(&selection.log))?;
    if selection.tail_lines > 0 {
        let (start, found) = tail_start(file, selection.tail_lines)?;
        file.seek(SeekFrom::Start(start))?;
        let missing = selection.tail_lines - found;
        before = before.filter(|_| missing > 0);
        if let Some(before) = &mut before {
            let (start, _) = tail_start(before, missing)?;
            before.seek(SeekFrom::Start(start))?;
        }
    }
    if let Some(before) = &mut before {
        send_rest(before, chunks).await?;
    }
    send_rest(file, chunks).await
}

/// Sends what was added; when the log was rotated, the rest of the old file and then the new one.
async fn catch_up(log: &Path, current: &mut Option<File>, chunks: &mpsc::Sender<Chunk>) -> io::Result<()> {
    if let Some(file) = current {
        send_rest(file, chunks).await?;
    }
    let newest = open(log)?;
    let inode =
        |file: &Option<File>| file.as_ref().and_then(|file| file.metadata().ok()).map(|file| file.ino());
    if newest.is_some() && inode(&newest) != inode(current) {
        if let Some(file) = current {
            // Written between the read above and the rotation.
            send_rest(file, chunks).await?;
        }
        *current = newest;
        if let Some(file) = current {
            send_rest(file, chunks).await?;
        }
    }
    Ok(())
}

/// Sends from where the file stands to its end. Reads are small and of files: they do not wait.
async fn send_rest(file: &mut File, chunks: &mpsc::Sender<Chunk>) -> io::Result<()> {
    loop {
        let mut chunk = vec![0; CHUNK_BYTES_MAX];
        let len = file.read(&mut chunk)?;
        chunk.truncate(len);
        if len == 0 || chunks.send(Ok((chunk, Position::in_file(file)?))).await.is_err() {
            return Ok(());
        }
    }
}

/// Where the last `lines` lines start, and how many there are if there are fewer.
fn tail_start(file: &mut File, lines: u32) -> io::Result<(u64, u32)> {
    let len = file.metadata()?.len();
    let (mut end, mut found) = (len, 0);
    let mut chunk = vec![0; CHUNK_BYTES_MAX];
    while end > 0 {
        let start = end.saturating_sub(CHUNK_BYTES_MAX as u64);
        let part = &mut chunk[..(end - start) as usize];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(part)?;
        for (index, _) in part.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n') {
            let after = start + index as u64 + 1;
            // The newline that ends the last line starts no other.
            if after == len {
                continue;
            }
            found += 1;
            if found == lines {
                return Ok((after, lines));
            }
        }
        end = start;
    }
    Ok((0, if len > 0 { found + 1 } else { 0 }))
}

impl Position {
    /// Where a file stands.
    fn in_file(mut file: &File) -> io::Result<Position> {
        let about = file.metadata()?;
        let made = about.created().ok().and_then(|made| made.duration_since(UNIX_EPOCH).ok());
        let made_ns = made.map_or(0, |made| made.as_nanos());
        Ok(Position { inode: about.ino(), made_ns, offset: file.stream_position()? })
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.inode, self.made_ns, self.offset)
    }
}

impl FromStr for Position {
    type Err = String;

    fn from_str(text: &str) -> Result<Position, String> {
        let mut parts = text.splitn(3, '.');
        let mut part = || parts.next().unwrap_or_default();
        let (inode, made_ns, offset) = (part().parse().ok(), part().parse().ok(), part().parse().ok());
        let position = inode.zip(made_ns).zip(offset).map(|((inode, made_ns), offset)| Position {
            inode,
            made_ns,
            offset,
        });
        position.ok_or_else(|| format!("`{text}` is no place in a log"))
    }
}

fn open(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Tells when something in the folder of a log changes.
struct FolderWatch {
    /// An inotify descriptor: read like a pipe, what is read matters only by its arrival.
    events: pipe::Receiver,
    folder: PathBuf,
}

impl FolderWatch {
    fn new(log: &Path) -> io::Result<FolderWatch> {
        let folder = log.parent().unwrap_or(Path::new("/")).to_owned();
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        let what = AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_DELETE_SELF;
        inotify.add_watch(&folder, what)?;
        // A log that is read keeps its folder's inode, which then does not tell of its end: the folder above does.
        if let Some(above) = folder.parent() {
            inotify.add_watch(above, AddWatchFlags::IN_DELETE | AddWatchFlags::IN_MOVED_FROM)?;
        }
        let events = pipe::Receiver::from_owned_fd_unchecked(inotify.into())?;
        Ok(FolderWatch { events, folder })
    }

    /// Waits for a change; false when the folder is gone.
    async fn changed(&self) -> io::Result<bool> {
        let mut events = [0; EVENTS_BYTES];
        loop {
            self.events.readable().await?;
            match self.events.try_read(&mut events) {
                Ok(_) => return Ok(self.folder.is_dir()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write as _, time::Duration};

    use tempfile::TempDir;
    use tokio::{task::JoinHandle, time::timeout};

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(10);

    struct Log {
        folder: TempDir,
    }

    impl Log {
        fn new(content: &str) -> Log {
            let log = Log { folder: tempfile::tempdir().unwrap() };
            fs::write(log.path(), content).unwrap();
            log
        }

        fn path(&self) -> PathBuf {
            self.folder.path().join("web.log")
        }

        fn append(&self, text: &str) {
            File::options()
                .append(true)
                .create(true)
                .open(self.path())
                .unwrap()
                .write_all(text.as_bytes())
                .unwrap();
        }

        fn start(&self, tail_lines: u32, follow: bool) -> (Reader, JoinHandle<Result<(), LogError>>) {
            self.start_at(Selection { log: self.path(), tail_lines, follow, after: None })
        }

        fn start_at(&self, selection: Selection) -> (Reader, JoinHandle<Result<(), LogError>>) {
            let (sender, chunks) = mpsc::channel(4);
            let reader = Reader { chunks, last: Position::default() };
            (reader, tokio::spawn(async move { read(selection, &sender).await }))
        }

        /// What comes after a place, without following it.
        async fn after(&self, place: Position) -> Result<String, LogError> {
            let after = Some(place.to_string().parse().unwrap());
            let selection = Selection { log: self.path(), tail_lines: 1, follow: false, after };
            let (mut reader, task) = self.start_at(selection);
            let text = reader.until_end().await;
            task.await.unwrap().map(|()| text)
        }

        fn rotate(&self, text: &str) {
            fs::rename(self.path(), rotated(&self.path())).unwrap();
            self.append(text);
        }

        async fn all(&self, tail_lines: u32) -> String {
            let (mut reader, task) = self.start(tail_lines, false);
            let text = reader.until_end().await;
            task.await.unwrap().unwrap();
            text
        }
    }

    struct Reader {
        chunks: mpsc::Receiver<Chunk>,
        /// Where the last chunk ended.
        last: Position,
    }

    impl Reader {
        async fn until_end(&mut self) -> String {
            let mut text = Vec::new();
            while let Some(chunk) = timeout(DEADLINE, self.chunks.recv()).await.unwrap() {
                let (chunk, place) = chunk.unwrap();
                assert!(chunk.len() <= CHUNK_BYTES_MAX);
                self.last = place;
                text.extend(chunk);
            }
            String::from_utf8(text).unwrap()
        }

        async fn until(&mut self, end: &str) -> String {
            let mut text = String::new();
            while !text.ends_with(end) {
                let chunk = timeout(DEADLINE, self.chunks.recv()).await.expect(&text).unwrap().unwrap();
                self.last = chunk.1;
                text.push_str(&String::from_utf8(chunk.0).unwrap());
            }
            text
        }
    }

    #[tokio::test]
    async fn the_last_lines_are_found() {
        let log = Log::new("one\ntwo\nthree\n");
        assert_eq!(log.all(0).await, "one\ntwo\nthree\n");
        assert_eq!(log.all(2).await, "two\nthree\n");
        assert_eq!(log.all(9).await, "one\ntwo\nthree\n");
        assert_eq!(Log::new("one\nunfinished").all(1).await, "unfinished");
        assert_eq!(Log::new("").all(3).await, "");
    }

    #[tokio::test]
    async fn the_tail_reaches_into_the_rotated_file() {
        let log = Log::new("three\n");
        fs::write(rotated(&log.path()), "one\ntwo\n").unwrap();
        assert_eq!(log.all(2).await, "two\nthree\n");
        assert_eq!(log.all(1).await, "three\n");
        assert_eq!(log.all(0).await, "one\ntwo\nthree\n");
    }

    #[tokio::test]
    async fn long_lines_across_chunks_are_whole() {
        let long = "x".repeat(CHUNK_BYTES_MAX + 10);
        let log = Log::new(&format!("first\n{long}\nlast\n"));
        assert_eq!(log.all(2).await, format!("{long}\nlast\n"));
    }

    #[tokio::test]
    async fn a_log_that_is_not_there_is_empty() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Log { folder }.all(0).await, "");
    }

    #[tokio::test]
    async fn a_follower_sees_what_is_added_also_after_a_rotation() {
        let log = Log::new("old\nnew\n");
        let (mut reader, task) = log.start(1, true);
        assert_eq!(reader.until("new\n").await, "new\n");
        log.append("more\n");
        assert_eq!(reader.until("more\n").await, "more\n");
        log.append("end of the first\n");
        fs::rename(log.path(), rotated(&log.path())).unwrap();
        log.append("start of the second\n");
        assert_eq!(reader.until("second\n").await, "end of the first\nstart of the second\n");
        drop(reader);
        timeout(DEADLINE, task).await.unwrap().unwrap().unwrap();
    }

    /// A restart of the server ended `netctl logs -f`, and who began anew read lines twice or not at all.
    #[tokio::test]
    async fn a_reader_goes_on_where_it_was_also_after_a_rotation() {
        let log = Log::new("one\ntwo\n");
        let (mut reader, _task) = log.start(1, true);
        reader.until("two\n").await;
        let place = reader.last;
        assert_eq!(log.after(place).await.unwrap(), "");
        log.append("three\n");
        assert_eq!(log.after(place).await.unwrap(), "three\n");
        log.rotate("four\n");
        assert_eq!(log.after(place).await.unwrap(), "three\nfour\n");
        log.rotate("five\n");
        assert!(matches!(log.after(place).await, Err(LogError::Lost)), "three is gone");
        assert_eq!(log.after(Position::default()).await.unwrap(), "four\nfive\n", "there was nothing then");
    }

    #[test]
    fn what_is_no_place_is_refused() {
        for text in ["", "1", "1.2", "1.2.x", "1.2.3.4", "-1.2.3"] {
            assert!(text.parse::<Position>().is_err(), "{text}");
        }
    }

    /// It had read that its log was gone before the folder was, and heard no more.
    #[tokio::test]
    async fn a_follower_ends_also_when_the_folder_goes_after_the_log() {
        let log = Log::new("text\n");
        let (mut reader, task) = log.start(0, true);
        reader.until("text\n").await;
        fs::remove_file(log.path()).unwrap();
        // Meanwhile it hears of that; if it does not, it hears of both at once.
        tokio::time::sleep(Duration::from_millis(50)).await;
        fs::remove_dir(log.folder.path()).unwrap();
        assert_eq!(reader.until_end().await, "");
        timeout(DEADLINE, task).await.unwrap().unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_follower_ends_with_the_pod() {
        let log = Log::new("text\n");
        let (mut reader, task) = log.start(0, true);
        reader.until("text\n").await;
        fs::remove_dir_all(log.folder.path()).unwrap();
        assert_eq!(reader.until_end().await, "");
        timeout(DEADLINE, task).await.unwrap().unwrap().unwrap();
    }
}
