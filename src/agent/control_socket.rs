//! The Unix socket on which a running daemon serves the people and programs of its own machine.
//!
//! Owns the socket file, the framing and the client side. Does not know how a request is fulfilled: the daemon
//! hands in a [`ControlHandler`]. Who may connect is decided by the file's mode and group alone.
//! Invariant: a joined stream that was cut never looks as if it had ended cleanly.
//!
//! # The wire
//!
//! The client sends one line of JSON, a [`Request`], at most [`MAX_LINE`] bytes with its newline, and waits with
//! its side open (a client that closes it no longer wants the answer). The daemon answers with one line of JSON: `{"ok": VALUE}`, `{"error": TEXT}` or `{"joined": true}`, and closes unless
//! it joined. After `joined`, each side sends chunks: a length of four bytes, big-endian, then so many bytes,
//! at most [`MAX_CHUNK`]. A length of zero is the end of that direction; the other goes on. A close without it
//! is a cut. A line or chunk over its limit, or one that does not parse, ends the connection.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures_util::{FutureExt as _, future::BoxFuture};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use crate::base::{Identity, Name};

/// Longest request or answer line. A status of a thousand forwards fits.
pub const MAX_LINE: usize = 1 << 20;
/// Longest chunk of a joined stream: what one read of a socket yields at most here.
pub const MAX_CHUNK: usize = 64 << 10;
/// Connections at once: each `culvert connect` holds one for its whole life.
const MAX_CONNECTIONS: usize = 256;
/// A client must send its request within this time; it is local.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// For a refusal, which holds up the next client.
const REFUSAL_TIMEOUT: Duration = Duration::from_millis(200);
/// After a failed accept (no descriptor left), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// Owner and group: the group `culvert` is who may use the daemon.
const SOCKET_MODE: u32 = 0o660;

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Join this connection to a target of a device.
    Connect {
        /// `device` or `device/module`.
        #[serde(with = "by_text")]
        device: Identity,
        /// The target's name.
        target: Name,
    },
    /// What would a reload of the daemon's own configuration file change?
    Plan,
    /// The daemon's live state.
    Status,
}

/// What a daemon answers.
pub enum Reply {
    /// A value to print.
    Json(serde_json::Value),
    /// It cannot be done; the text says why.
    Refused(String),
    /// This stream is joined to the client.
    Join(Box<dyn JoinIo>),
}

/// Any byte stream that a client can be joined to.
pub trait JoinIo: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> JoinIo for T {}

/// The daemon's side of a request.
pub trait ControlHandler: Send + Sync {
    /// Fulfils one request. Dropped when the client goes away or the daemon stops.
    fn handle(&self, request: Request) -> BoxFuture<'_, Reply>;
}

/// Why the socket could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another daemon answers on it.
    #[error("another daemon is running: {} is in use", .0.display())]
    InUse(PathBuf),
    /// Something that is not a socket has its name.
    #[error("{} exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// It is another user's, and whether a daemon answers on it cannot be asked.
    #[error(
        "the control socket {} belongs to another user; remove it, if no daemon of that user's is running", .0.display()
    )]
    Foreign(PathBuf),
    /// The file cannot be made.
    #[error("the control socket {} cannot be opened", path.display())]
    Io {
        /// The socket's path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Why a call to a daemon failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// No daemon answers on the socket.
    #[error("no daemon answers on {}", path.display())]
    NotRunning {
        /// The socket's path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The user may not use the socket.
    #[error("{} may be used only by its owner and group; add this user to the group", path.display())]
    Forbidden {
        /// The socket's path.
        path: PathBuf,
    },
    /// The daemon said why it cannot.
    #[error("{0}")]
    Refused(String),
    /// The daemon's answer is not one.
    #[error("the daemon's answer cannot be read")]
    Answer(#[source] io::Error),
}

/// A bound socket that serves nothing yet. Its file is removed on drop.
pub struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
}

/// What a call yields.
pub enum Answer {
    /// A value to print.
    Json(serde_json::Value),
    /// The connection is joined to a target.
    Joined(Joined),
}

/// The client's end of a joined stream.
pub struct Joined(Buffered);

/// What was read behind a line belongs to what follows it.
type Buffered = BufReader<UnixStream>;

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum AnswerLine {
    Ok(serde_json::Value),
    Error(String),
    Joined(bool),
}

impl ControlSocket {
    /// Binds the path, over a socket file that a dead daemon left.
    pub async fn bind(path: &Path) -> Result<Self, BindError> {
        let error = |source| BindError::Io { path: path.into(), source };
        remove_stale(path).await?;
        let listener = UnixListener::bind(path).map_err(error)?;
        let bound = Self { listener, path: path.into() };
        fs::set_permissions(path, fs::Permissions::from_mode(SOCKET_MODE)).map_err(error)?;
        Ok(bound)
    }

    /// Serves until `shutdown`, then cuts what is left.
    pub async fn run(self, handler: Arc<dyn ControlHandler>, shutdown: CancellationToken) {
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                () = shutdown.cancelled() => break,
                Some(_) = connections.join_next() => continue,
                accepted = self.listener.accept() => accepted,
            };
            match accepted.map(|(client, _)| (client, slots.clone().try_acquire_owned())) {
                Ok((client, Err(_))) => refuse(client).await,
                Ok((client, Ok(slot))) => {
                    let handler = handler.clone();
                    connections.spawn(async move {
                        if let Err(error) = serve(client, &*handler).await {
                            tracing::debug!(%error, "a control connection ended");
                        }
                        drop(slot);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "the control socket could not accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        connections.shutdown().await;
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(%error, path = %self.path.display(), "the control socket's file was gone already");
        }
    }
}

async fn remove_stale(path: &Path) -> Result<(), BindError> {
    let Ok(found) = fs::symlink_metadata(path) else { return Ok(()) };
    if !found.file_type().is_socket() {
        return Err(BindError::NotASocket(path.into()));
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|source| BindError::Io { path: path.into(), source })
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(BindError::Foreign(path.into())),
        _ => Err(BindError::InUse(path.into())),
    }
}

/// Says that there are too many, instead of letting somebody wait without a word for one of them to end.
async fn refuse(client: UnixStream) {
    let refusal = async {
        let mut client = BufReader::new(client);
        // A socket that is closed with something unread in it takes back what was written.
        read_line(&mut client).await?;
        let text = format!("{MAX_CONNECTIONS} `culvert connect`s run through this daemon, as many as may; end some");
        write_line(&mut client, &AnswerLine::Error(text)).await
    };
    // Who does not listen does not miss it.
    let _ = tokio::time::timeout(REFUSAL_TIMEOUT, refusal).await;
}

async fn serve(client: UnixStream, handler: &dyn ControlHandler) -> io::Result<()> {
    let mut client = BufReader::new(client);
    let line = tokio::time::timeout(REQUEST_TIMEOUT, read_line(&mut client)).await??;
    let reply = match serde_json::from_slice(&line) {
        Ok(request) => tokio::select! {
            reply = handler.handle(request) => reply,
            gone = gone(&mut client) => return Err(gone),
        },
        Err(error) => Reply::Refused(format!("the request is not understood: {error}")),
    };
    match reply {
        Reply::Json(value) => write_line(&mut client, &AnswerLine::Ok(value)).await,
        Reply::Refused(reason) => write_line(&mut client, &AnswerLine::Error(reason)).await,
        Reply::Join(io) => {
            write_line(&mut client, &AnswerLine::Joined(true)).await?;
            let (io_read, io_write) = tokio::io::split(io);
            let (client_read, mut client_write) = tokio::io::split(client);
            tokio::try_join!(pack(io_read, &mut client_write), unpack(client_read, io_write))?;
            // Without this the client, whose target may have ended long ago, could not tell that its last bytes arrived.
            client_write.write_u32(0).await?;
            client_write.shutdown().await
        }
    }
}

/// Ends when the client has gone: nobody waits for the answer any more. A client that speaks before it was
/// answered breaks the protocol and is treated alike.
async fn gone(client: &mut Buffered) -> io::Error {
    match client.fill_buf().await {
        Ok([]) => io::ErrorKind::BrokenPipe.into(),
        Ok(_) => io::Error::new(io::ErrorKind::InvalidData, "the client did not wait for the answer"),
        Err(error) => error,
    }
}

/// Asks the daemon behind `path`.
pub async fn call(path: &Path, request: &Request) -> Result<Answer, CallError> {
    let daemon = UnixStream::connect(path).await.map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => CallError::Forbidden { path: path.into() },
        _ => CallError::NotRunning { path: path.into(), source },
    })?;
    let mut daemon = BufReader::new(daemon);
    write_line(&mut daemon, request).await.map_err(CallError::Answer)?;
    let line = read_line(&mut daemon).await.map_err(CallError::Answer)?;
    match serde_json::from_slice(&line).map_err(|error| CallError::Answer(error.into()))? {
        AnswerLine::Ok(value) => Ok(Answer::Json(value)),
        AnswerLine::Error(reason) => Err(CallError::Refused(reason)),
        AnswerLine::Joined(_) => Ok(Answer::Joined(Joined(daemon))),
    }
}

impl Joined {
    /// Carries `input` to the target and the target's bytes to `output`, until both directions have ended and the daemon
    /// says so; a cut ends both at once.
    pub async fn run<R, W>(self, input: R, output: W) -> io::Result<()>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let (mut daemon_read, daemon_write) = tokio::io::split(self.0);
        let down = async {
            unpack(&mut daemon_read, output).await?;
            match daemon_read.read_u32().await.map_err(cut)? {
                0 => Ok(()),
                _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the daemon sent more behind the end")),
            }
        };
        tokio::try_join!(pack(input, daemon_write), down)?;
        Ok(())
    }
}

/// Chunks of `plain`, each behind its length; zero is its end.
async fn pack<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(mut plain: R, mut framed: W) -> io::Result<()> {
    let mut chunk = vec![0; 4 + MAX_CHUNK];
    loop {
        let length = plain.read(&mut chunk[4..]).await?;
        let header = u32::try_from(length).map_err(io::Error::other)?;
        chunk[..4].copy_from_slice(&header.to_be_bytes());
        framed.write_all(&chunk[..4 + length]).await?;
        framed.flush().await?;
        if length == 0 {
            return Ok(());
        }
    }
}

async fn unpack<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(mut framed: R, mut plain: W) -> io::Result<()> {
    let mut chunk = vec![0; MAX_CHUNK];
    loop {
        let length = framed.read_u32().await.map_err(cut)? as usize;
        if length == 0 {
            return plain.shutdown().await;
        }
        let Some(chunk) = chunk.get_mut(..length) else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a chunk is longer than allowed"));
        };
        framed.read_exact(chunk).await.map_err(cut)?;
        plain.write_all(chunk).await?;
        plain.flush().await?;
    }
}

/// The end of the socket inside or between chunks is not the end of the stream.
fn cut(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => io::ErrorKind::ConnectionReset.into(),
        _ => error,
    }
}

async fn write_line(socket: &mut Buffered, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    socket.write_all(&line).await
}

async fn read_line(socket: &mut Buffered) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    socket.take(MAX_LINE as u64).read_until(b'\n', &mut line).await?;
    match line.pop() {
        Some(b'\n') => Ok(line),
        _ if line.len() + 1 >= MAX_LINE => Err(io::Error::new(io::ErrorKind::InvalidData, "the line is too long")),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Any bytes from either side of the socket: a request, an answer, or the chunks of a joined stream. For fuzzers.
///
/// # Panics
/// If a request changes its meaning on the way, or a joined stream yields more than came.
pub fn fuzz_control_socket(data: &[u8]) {
    if let Ok(request) = serde_json::from_slice::<Request>(data) {
        let again = serde_json::to_vec(&request).ok().and_then(|line| serde_json::from_slice(&line).ok());
        assert_eq!(again, Some(request), "a request can be said again");
    }
    // Either is fine; only a panic is not.
    let _ = serde_json::from_slice::<AnswerLine>(data);
    let mut plain = Vec::new();
    let unpacked = unpack(data, &mut plain).now_or_never().expect("bytes in memory are always there");
    assert!(plain.len() < data.len() || unpacked.is_err(), "an end that nobody sent");
}

/// An identity as its text.
mod by_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error as _};

    use crate::base::Identity;

    pub(super) fn serialize<S: Serializer>(identity: &Identity, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(identity)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Identity, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests;
