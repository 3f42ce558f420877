//! The audit: one line for each call that changes something, or that was refused, in the state directory.
//!
//! A line says when, who, in which role, from where, which method, what it was about, and what came of it. It never
//! holds what was sent: no secret, no token, no environment. What the scheduler and the nodes do by themselves is in
//! the log of revisions, not here.

use std::{collections::VecDeque, future::Future, io, net::SocketAddr, path::Path, sync::Mutex};

use scheduler_core::{authority::Turn, event::Event};
use serde::Serialize;
use tonic::{Code, Status};
use tracing::{error, info, warn};

use crate::{
    clock::Clock,
    identity::Identity,
    mutex::lock,
    writer::{Committed, WriteError},
};

mod file;
mod refusals;
mod repeats;

use self::{file::RotatedFile, refusals::Refusals, repeats::Repeats};

/// The audit's name in the state directory; older files have `.1` to `.7` behind it.
const FILE: &str = "audit.log";
/// The most bytes of a text of others in a line.
const TEXT_LEN_MAX: usize = 512;
/// Lines that wait for room on the disk.
const WAITING_MAX: usize = 1000;
/// Things that one call writes about.
const SUBJECTS_MAX: usize = 16;

tokio::task_local! {
    /// What the call that is being answered has written so far.
    static WRITES: Mutex<Writes>;
}

#[derive(Default)]
struct Writes {
    subjects: Vec<String>,
    revision: Option<u64>,
}

/// Where lines go.
pub(crate) struct Audit {
    clock: Clock,
    book: Mutex<Book>,
}

struct Book {
    file: RotatedFile,
    refusals: Refusals,
    repeats: Repeats,
    /// Lines that could not be written and wait for room, the oldest first.
    waiting: VecDeque<String>,
    /// Those beyond [`WAITING_MAX`], of which there will be no line.
    lost: u64,
}

/// Who calls what.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) caller: Identity,
    pub(crate) from: String,
    pub(crate) path: String,
}

#[derive(Serialize)]
struct Line<'a> {
    time: String,
    caller: String,
    role: &'static str,
    from: &'a str,
    method: &'a str,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    subjects: &'a [String],
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    revision: Option<u64>,
    #[serde(skip_serializing_if = "str::is_empty")]
    reason: &'a str,
    /// Calls before this one of which there is no line: they came to nothing and were too many, or the disk was full.
    #[serde(skip_serializing_if = "is_zero")]
    unwritten: u64,
    /// How often the same was refused, for what is written only when that has a digit more.
    #[serde(skip_serializing_if = "is_zero")]
    times: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl Audit {
    pub(crate) fn open(dir: &Path, clock: Clock) -> Audit {
        let book = Book {
            file: RotatedFile::new(dir.join(FILE)),
            refusals: Refusals::default(),
            repeats: Repeats::default(),
            waiting: VecDeque::new(),
            lost: 0,
        };
        Audit { clock, book: Mutex::new(book) }
    }

    /// A call that was not let in. Of a flood of them, so many are written that the changes of months are not pushed
    /// out; how many were not is in the next line.
    pub(crate) fn refused(&self, call: &Call, reason: &str) {
        self.write(Line { outcome: "refused", reason, ..self.line(call) });
    }

    /// A machine was refused, and asks again and again.
    pub(crate) fn refused_again(&self, call: &Call, reason: &str) {
        let who = call.caller.to_string();
        let Some(times) = lock(&self.book).repeats.count(&who, &call.path, reason) else { return };
        warn!(caller = who, from = call.from, path = call.path, reason, times, "refused");
        self.write(Line { outcome: "refused", reason: cut(reason), times, ..self.line(call) });
    }

    /// Answers a call that changes something, and writes its line before the answer is sent; also when the caller does
    /// not wait for it.
    pub(crate) async fn follow<T>(
        &self,
        call: Call,
        answer: impl Future<Output = T>,
        status: impl Fn(&T) -> Status,
    ) -> T {
        let line = Unfinished { audit: self, call, is_finished: false };
        let answering = async move {
            let mut line = line;
            let answer = answer.await;
            line.finish(&status(&answer));
            answer
        };
        WRITES.scope(Mutex::default(), answering).await
    }

    fn line<'a>(&self, call: &'a Call) -> Line<'a> {
        Line {
            time: self.clock.wall().to_string(),
            caller: call.caller.to_string(),
            role: call.caller.role_word(),
            from: &call.from,
            method: cut(call.path.trim_start_matches('/')),
            subjects: &[],
            outcome: "",
            revision: None,
            reason: "",
            unwritten: 0,
            times: 0,
        }
    }

    fn finished(&self, call: &Call, outcome: &'static str, reason: &str) {
        let taken = WRITES.try_with(|writes| std::mem::take(&mut *lock(writes)));
        // Outside of `follow` nothing was written.
        let Writes { subjects, revision } = taken.unwrap_or_default();
        let line = Line { outcome, revision, subjects: &subjects, reason: cut(reason), ..self.line(call) };
        info!(
            caller = line.caller,
            from = line.from,
            method = line.method,
            ?subjects,
            outcome,
            reason,
            "audit"
        );
        self.write(line);
    }

    /// Calls that came to nothing anybody can make, and as many as they like.
    fn write(&self, mut line: Line<'_>) {
        let mut book = lock(&self.book);
        if line.outcome != "done" {
            let Some(unwritten) = book.refusals.admit(self.clock.now()) else { return };
            line.unwritten = unwritten;
        }
        line.unwritten += std::mem::take(&mut book.lost);
        book.write(&line);
    }
}

impl Book {
    fn write(&mut self, line: &Line<'_>) {
        let text = serde_json::to_string(line).expect("texts and numbers are JSON");
        let was_waiting = !self.waiting.is_empty();
        let _ = self.flush();
        if self.waiting.len() == WAITING_MAX {
            self.lost += 1 + line.unwritten;
            return;
        }
        self.waiting.push_back(text);
        if let Err(error) = self.flush()
            && !was_waiting
        {
            error!(%error, "the audit cannot be written, and waits for room: is the disk full?");
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        while let Some(first) = self.waiting.front() {
            self.file.append(first)?;
            self.waiting.pop_front();
        }
        Ok(())
    }
}

/// A call whose line is not written yet. When it is dropped the caller has gone.
struct Unfinished<'a> {
    audit: &'a Audit,
    call: Call,
    is_finished: bool,
}

impl Unfinished<'_> {
    fn finish(&mut self, status: &Status) {
        let outcome = match status.code() {
            Code::Ok => "done",
            Code::Unauthenticated | Code::PermissionDenied => "refused",
            _ => "failed",
        };
        self.is_finished = true;
        self.audit.finished(&self.call, outcome, status.message());
    }
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if !self.is_finished {
            self.audit.finished(&self.call, "unknown", "the caller has gone before the answer");
        }
    }
}

/// Notes what a call asks the writer for.
pub(crate) fn asked(event: &Event) {
    about(&subject(event));
}

/// Notes what a call is about.
pub(crate) fn about(what: &str) {
    note(|writes| {
        if writes.subjects.len() < SUBJECTS_MAX {
            writes.subjects.push(cut(what).to_owned());
        }
    });
}

/// Notes what came of it.
pub(crate) fn answered(result: &Result<Committed, WriteError>) {
    if let Ok(Committed { revision, made: Some(_) }) = result {
        note(|writes| writes.revision = Some(*revision));
    }
}

fn note(write: impl FnOnce(&mut Writes)) {
    // What is not done for a call is not audited.
    let _ = WRITES.try_with(|writes| write(&mut lock(writes)));
}

/// What an event is about, in a word or two. Names only, and never what it holds.
fn subject(event: &Event) -> String {
    match event {
        Event::ApplyJob(job, _) | Event::ApplyJobAt(_, job, _) => format!("job/{}", cut(&job.job)),
        Event::DeleteJob(name) => format!("job/{}", cut(name)),
        Event::Deploy(job, _) => format!("deploy of job/{}", cut(&job.job)),
        Event::DeployOrder(id, _) => format!("deploy/{}", cut(&id.to_string())),
        Event::DeleteNode(name) | Event::NodeDead(name) => format!("node/{}", cut(name)),
        Event::CreateToken(_, token) => {
            format!("token for {} {}", token.role.word(), token.name.as_deref().unwrap_or("-"))
        }
        Event::TurnCa(turn) => match turn {
            Turn::Rotate { next, .. } => format!("ca/{}", cut(next)),
            Turn::Undo => "ca, undo".to_owned(),
            Turn::Retire { force: true } => "ca, retire by force".to_owned(),
            Turn::Retire { .. } => "ca, retire".to_owned(),
        },
        Event::Renew(renew) => format!("key of {}", cut(&renew.holder.uri())),
        Event::KeyUsed(holder, _) => format!("key of {}", cut(&holder.uri())),
        Event::Enroll(enroll) => format!("key {}", enroll.key.get(..16).unwrap_or_default()),
        other => {
            let text = format!("{other:?}");
            text.split(['(', ' ', '{']).next().unwrap_or_default().to_owned()
        }
    }
}

/// Where a TCP connection comes from.
pub(crate) fn from_tcp(remote: Option<SocketAddr>) -> String {
    remote.map_or_else(|| "?".to_owned(), |remote| remote.to_string())
}

fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(TEXT_LEN_MAX)]
}

#[cfg(test)]
mod tests;
