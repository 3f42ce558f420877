//! The agents that are connected to `supervisor.sock`: commands in, statuses out, neither ever waited for.

use std::{
    fs, io,
    io::{Read as _, Write as _},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};

use crate::socket;

use super::status::{Command, LINE_BYTES_MAX, SOCKET_FILE, Status};

/// The most connections at a time; the oldest makes room for a new one.
const CLIENTS_MAX: usize = 4;

/// The socket and who is connected to it.
#[derive(Debug)]
pub(super) struct Clients {
    path: PathBuf,
    listener: UnixListener,
    connected: Vec<Client>,
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    received: Vec<u8>,
}

impl Clients {
    /// Listens in `pod_dir`; the caller holds the pod's lock, so a socket that is there is a dead one's.
    pub(super) fn listen(pod_dir: &Path) -> io::Result<Clients> {
        let listener = socket::listen(pod_dir, SOCKET_FILE)?;
        listener.set_nonblocking(true)?;
        Ok(Clients { path: pod_dir.join(SOCKET_FILE), listener, connected: Vec::new() })
    }

    /// What to poll for input: the listener first, then the clients.
    pub(super) fn sources(&self) -> Vec<BorrowedFd<'_>> {
        let clients = self.connected.iter().map(|client| client.stream.as_fd());
        std::iter::once(self.listener.as_fd()).chain(clients).collect()
    }

    /// Accepts who waits and tells each the status.
    pub(super) fn accept(&mut self, status: &Status) {
        while let Ok((stream, _)) = self.listener.accept() {
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            if self.connected.len() == CLIENTS_MAX {
                self.connected.remove(0);
            }
            let mut client = Client { stream, received: Vec::new() };
            if client.send(status) {
                self.connected.push(client);
            }
        }
    }

    /// The commands that have come; who hangs up or talks nonsense is dropped.
    pub(super) fn receive(&mut self) -> Vec<Command> {
        let mut commands = Vec::new();
        self.connected.retain_mut(|client| client.receive(&mut commands));
        commands
    }

    /// Sends `status` to all; who does not read is dropped and may connect again.
    pub(super) fn send(&mut self, status: &Status) {
        self.connected.retain_mut(|client| client.send(status));
    }

    /// Removes the socket.
    pub(super) fn close(self) {
        // Left behind, it refuses connections, which means the same.
        let _ = fs::remove_file(&self.path);
    }
}

impl Client {
    fn send(&mut self, status: &Status) -> bool {
        let mut line = serde_json::to_vec(status).expect("a status holds only strings and numbers");
        line.push(b'\n');
        self.stream.write_all(&line).is_ok()
    }

    fn receive(&mut self, commands: &mut Vec<Command>) -> bool {
        let mut chunk = [0; 4096];
        let open = loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => break false,
                Ok(len) => self.received.extend_from_slice(&chunk[..len]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break false,
            }
            if self.received.len() > LINE_BYTES_MAX {
                return false;
            }
        };
        self.parse(commands) && open
    }

    fn parse(&mut self, commands: &mut Vec<Command>) -> bool {
        while let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.received.drain(..=end).collect();
            match serde_json::from_slice(&line) {
                Ok(command) => commands.push(command),
                Err(_) => return false,
            }
        }
        true
    }
}
