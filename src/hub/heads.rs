//! The guard in front of the HTTP parser: lets only request heads through that mean one thing to everyone.
//!
//! Owns the size, the shape and the time of request heads, and the time of answers (threats.md, rows 6, 8 and 10).
//! Does not know routes or tokens. Invariant: the HTTP parser sees a head only when it is whole, at most
//! [`MAX_HEAD`] bytes long, with CRLF at every line's end, no folded line, and at most one length; and only when the
//! request before it has been answered.
//!
//! Why: hyper accepts bare LF and settles a conflict of lengths by itself; a proxy in front may settle it otherwise.
//! Request bodies come with Content-Length only: no known client of this API sends them in chunks (411).

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep_until},
};

/// Longest request head: two tokens of 4 KiB and a path of 1 KiB fit.
pub(in crate::hub) const MAX_HEAD: usize = 16 * 1024;
/// Most header fields: browsers and SDKs send fewer than 30.
pub(in crate::hub) const MAX_HEADERS: usize = 64;
/// A connection may wait this long for its next request: longer than the longest answer takes, twice 300 s.
const IDLE: Duration = Duration::from_secs(660);
/// Bytes read at a time while a head is gathered.
const CHUNK: usize = 4096;

/// What is wrong with a head: the status to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    Malformed,
    /// A body in chunks, without a length.
    LengthRequired,
    TooLarge,
}

/// What the guard must know of a head to find the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Head {
    body: u64,
    upgrade: bool,
}

#[derive(Debug)]
enum State {
    /// Gathering a head.
    Head,
    /// Passing this many bytes of a body.
    Body(u64),
    /// Something else is spoken from here on.
    Upgraded,
    /// Telling the client what was wrong: the answer's bytes, and how many have been sent.
    Refusing(&'static [u8], usize),
}

/// Where the answer to the last head is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reply {
    /// Not begun.
    Due,
    /// In part with the kernel, or not flushed.
    Begun,
    Done,
}

/// A connection whose request heads are checked.
#[derive(Debug)]
pub(in crate::hub) struct Guarded<S> {
    io: S,
    state: State,
    reply: Reply,
    /// Who reads while an answer is not done: what was gathered meanwhile is judged then.
    reader: Option<Waker>,
    /// Bytes of a head that is not whole yet.
    gathered: Vec<u8>,
    /// How many of them have been looked at: a head that comes byte by byte is not read again and again.
    scanned: usize,
    /// Checked bytes for the parser, and how many it has taken.
    checked: Vec<u8>,
    taken: usize,
    head_time: Duration,
    deadline: Pin<Box<Sleep>>,
    stall_time: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Guarded<S> {
    /// Guards `io`: a head takes at most `head_time`, and an answer is taken in at least every `stall_time`.
    pub(in crate::hub) fn new(io: S, head_time: Duration, stall_time: Duration) -> Self {
        Self {
            io,
            state: State::Head,
            reply: Reply::Done,
            reader: None,
            gathered: Vec::new(),
            scanned: 0,
            checked: Vec::new(),
            taken: 0,
            head_time,
            deadline: Box::pin(sleep_until(Instant::now() + head_time)),
            stall_time,
            stalled: None,
        }
    }

    /// The connection, when HTTP is over, and what it has read that the parser had no room for.
    pub(in crate::hub) fn into_parts(self) -> (S, Bytes) {
        let held = Bytes::from(self.checked).slice(self.taken..);
        (self.io, held)
    }

    fn poll_gather(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        let mut chunk = [0; CHUNK];
        let mut chunk = ReadBuf::new(&mut chunk);
        if Pin::new(&mut self.io).poll_read(cx, &mut chunk)?.is_pending() {
            ready!(self.deadline.as_mut().poll(cx));
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let read = chunk.filled();
        let first = self.gathered.is_empty();
        self.gathered.extend_from_slice(read);
        if self.reply == Reply::Done {
            self.skip_empty_lines();
            if first && !self.gathered.is_empty() {
                self.limit_head();
            }
        }
        Poll::Ready(Ok(!read.is_empty()))
    }

    /// The first head's time runs from the connection's start, a later one's from its first byte.
    fn limit_head(&mut self) {
        let by = (Instant::now() + self.head_time).min(self.deadline.deadline());
        self.deadline.as_mut().reset(by);
    }

    /// Old clients send one behind a body (RFC 9112, section 2.2).
    fn skip_empty_lines(&mut self) {
        let lines = self.gathered.chunks_exact(2).take_while(|line| line == b"\r\n").count();
        if lines > 0 {
            self.gathered.drain(..2 * lines);
            self.scanned = 0;
        }
    }

    /// While an answer is not done the next head is gathered, but not judged: a refusal would overtake the answer.
    fn poll_gather_ahead(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        self.reader = Some(cx.waker().clone());
        if self.gathered.len() < MAX_HEAD {
            return self.poll_gather(cx);
        }
        ready!(self.deadline.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }

    /// Some bytes of an answer have been written. That the body may come (100) is not an answer.
    fn replied(&mut self, bytes: &[u8]) {
        if self.reply == Reply::Due && !bytes.is_empty() && !bytes.starts_with(b"HTTP/1.1 1") {
            self.reply = Reply::Begun;
        }
    }

    /// All that was written is with the kernel.
    fn flushed(&mut self) {
        if self.reply != Reply::Begun {
            return;
        }
        self.reply = Reply::Done;
        self.deadline.as_mut().reset(Instant::now() + IDLE);
        self.skip_empty_lines();
        if !self.gathered.is_empty() {
            self.limit_head();
        }
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }

    /// If a whole head has been gathered: hands it over, or refuses it.
    fn judge(&mut self) {
        let from = self.scanned.saturating_sub(3);
        self.scanned = self.gathered.len();
        let end = self.gathered[from..].windows(4).position(|bytes| bytes == b"\r\n\r\n").map(|at| from + at + 4);
        let verdict = match end {
            Some(end) if end <= MAX_HEAD => check_head(&self.gathered[..end]).map(|head| (head, end)),
            None if has_bare_newline(&self.gathered, from) => Err(Refusal::Malformed),
            None if self.gathered.len() < MAX_HEAD => return,
            _ => Err(Refusal::TooLarge),
        };
        match verdict {
            Ok((head, end)) => self.pass(head, end),
            Err(refusal) => self.state = State::Refusing(refusal.answer(), 0),
        }
    }

    fn pass(&mut self, head: Head, end: usize) {
        let behind = (self.gathered.len() - end) as u64;
        let body_here = if head.upgrade { behind } else { behind.min(head.body) };
        let rest = self.gathered.split_off(end + body_here as usize);
        self.checked = std::mem::replace(&mut self.gathered, rest);
        self.taken = 0;
        self.scanned = 0;
        self.deadline.as_mut().reset(Instant::now() + IDLE);
        self.reply = Reply::Due;
        self.state = match head {
            Head { upgrade: true, .. } => State::Upgraded,
            Head { body, .. } if body > body_here => State::Body(body - body_here),
            Head { .. } => State::Head,
        };
    }

    fn poll_refuse(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let State::Refusing(answer, sent) = self.state {
            if sent == answer.len() {
                return Pin::new(&mut self.io).poll_flush(cx);
            }
            let written = ready!(self.poll_unstalled(cx, |io, cx| io.poll_write(cx, &answer[sent..])))?;
            self.state = State::Refusing(answer, sent + written);
        }
        Poll::Ready(Ok(()))
    }

    /// Writes or flushes, unless that has been pending for too long.
    fn poll_unstalled<T>(
        &mut self,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut S>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if let Poll::Ready(done) = write(Pin::new(&mut self.io), cx) {
            self.stalled = None;
            return Poll::Ready(done);
        }
        let until = Instant::now() + self.stall_time;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep_until(until)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }

    fn hand_over(&mut self, buffer: &mut ReadBuf<'_>) {
        let waiting = &self.checked[self.taken..];
        let count = waiting.len().min(buffer.remaining());
        buffer.put_slice(&waiting[..count]);
        self.taken += count;
        if self.taken == self.checked.len() {
            self.checked = Vec::new();
            self.taken = 0;
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if !this.checked.is_empty() {
                this.hand_over(buffer);
                return Poll::Ready(Ok(()));
            }
            match this.state {
                State::Upgraded => return Pin::new(&mut this.io).poll_read(cx, buffer),
                State::Refusing(..) => return this.poll_refuse(cx),
                State::Body(left) => {
                    let most = buffer.remaining().min(usize::try_from(left).unwrap_or(usize::MAX));
                    let mut limited = ReadBuf::new(buffer.initialize_unfilled_to(most));
                    ready!(Pin::new(&mut this.io).poll_read(cx, &mut limited))?;
                    let read = limited.filled().len();
                    buffer.advance(read);
                    this.state = if left == read as u64 { State::Head } else { State::Body(left - read as u64) };
                    return Poll::Ready(Ok(()));
                }
                State::Head if this.reply != Reply::Done => {
                    if !ready!(this.poll_gather_ahead(cx))? {
                        return Poll::Ready(Ok(()));
                    }
                }
                State::Head => {
                    // What came behind the head before is judged first: it may be whole already.
                    this.judge();
                    let waits = matches!(this.state, State::Head) && this.checked.is_empty();
                    if waits && !ready!(this.poll_gather(cx))? {
                        return Poll::Ready(Ok(()));
                    }
                }
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = ready!(this.poll_unstalled(cx, |io, cx| io.poll_write(cx, bytes)))?;
        this.replied(&bytes[..written]);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_unstalled(cx, |io, cx| io.poll_flush(cx)))?;
        this.flushed();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_unstalled(cx, |io, cx| io.poll_shutdown(cx))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = ready!(this.poll_unstalled(cx, |io, cx| io.poll_write_vectored(cx, slices)))?;
        if written > 0 {
            this.replied(slices.iter().find(|slice| !slice.is_empty()).map_or(&[], |slice| slice));
        }
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

impl Refusal {
    fn answer(self) -> &'static [u8] {
        match self {
            Self::Malformed => b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            Self::LengthRequired => b"HTTP/1.1 411 Length Required\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            Self::TooLarge => {
                b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            }
        }
    }
}

/// From position `from` on: a line that ends without CR, or a CR within a line.
fn has_bare_newline(bytes: &[u8], from: usize) -> bool {
    let mut positions = from..bytes.len();
    positions.any(|at| match bytes[at] {
        b'\n' => at == 0 || bytes[at - 1] != b'\r',
        b'\r' => bytes.get(at + 1).is_some_and(|next| *next != b'\n'),
        _ => false,
    })
}

/// Checks any bytes as a request head. For fuzzing: an accepted head has a shape that every parser agrees on.
pub fn fuzz_head(data: &[u8]) {
    if check_head(data).is_ok() {
        assert!(!has_bare_newline(data, 0) && !data.contains(&0));
    }
}

fn check_head(head: &[u8]) -> Result<Head, Refusal> {
    let text = std::str::from_utf8(head).map_err(|_| Refusal::Malformed)?;
    if has_bare_newline(head, 0) {
        return Err(Refusal::Malformed);
    }
    let mut lines = text.trim_end_matches("\r\n").split("\r\n");
    check_request_line(lines.next().unwrap_or_default())?;
    let mut fields = Fields::default();
    for (index, line) in lines.enumerate() {
        if index >= MAX_HEADERS {
            return Err(Refusal::TooLarge);
        }
        fields.take(line)?;
    }
    match fields {
        Fields { hosts: 1, length: None, chunked: true, upgrade: false } => Err(Refusal::LengthRequired),
        // After a switch of protocols nobody could say where the body ends.
        Fields { hosts: 1, length: Some(1..), upgrade: true, .. } => Err(Refusal::Malformed),
        Fields { hosts: 1, length, chunked: false, upgrade } => Ok(Head { body: length.unwrap_or(0), upgrade }),
        Fields { .. } => Err(Refusal::Malformed),
    }
}

/// `METHOD /path HTTP/1.1`, and nothing else: no absolute form, no asterisk, no HTTP/1.0.
fn check_request_line(line: &str) -> Result<(), Refusal> {
    let mut words = line.split(' ');
    let (Some(method), Some(target), Some("HTTP/1.1"), None) = (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(Refusal::Malformed);
    };
    let in_target = |byte: u8| byte.is_ascii_graphic() && byte != b'#';
    let good = is_token(method) && target.starts_with('/') && target.bytes().all(in_target);
    if good { Ok(()) } else { Err(Refusal::Malformed) }
}

#[derive(Debug, Default)]
struct Fields {
    hosts: usize,
    length: Option<u64>,
    chunked: bool,
    upgrade: bool,
}

impl Fields {
    fn take(&mut self, line: &str) -> Result<(), Refusal> {
        let (name, value) = line.split_once(':').ok_or(Refusal::Malformed)?;
        let value = value.trim_matches([' ', '\t']);
        if !is_token(name) || value.bytes().any(|byte| byte.is_ascii_control() && byte != b'\t') {
            return Err(Refusal::Malformed);
        }
        if name.eq_ignore_ascii_case("host") {
            self.hosts += 1;
            if !is_authority(value) {
                return Err(Refusal::Malformed);
            }
        } else if name.eq_ignore_ascii_case("upgrade") {
            self.upgrade = true;
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            if self.chunked || !value.eq_ignore_ascii_case("chunked") {
                return Err(Refusal::Malformed);
            }
            self.chunked = true;
        } else if name.eq_ignore_ascii_case("content-length") {
            let digits = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
            let length = value.parse().ok().filter(|_| digits && self.length.is_none());
            self.length = Some(length.ok_or(Refusal::Malformed)?);
        }
        Ok(())
    }
}

/// A host, perhaps with a port: nothing that another parser could take for a path or a user's name (RFC 9112, 3.2).
fn is_authority(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=%:[]".contains(&byte))
}

fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    fn guarded(io: tokio::io::DuplexStream) -> Guarded<tokio::io::DuplexStream> {
        Guarded::new(io, Duration::from_secs(10), Duration::from_secs(30))
    }

    /// What the parser sees, which answers at once, and what the client is answered besides, when the client sends
    /// `bytes` and then ends.
    async fn through(bytes: &[u8]) -> (Vec<u8>, Vec<u8>) {
        let (mut client, io) = tokio::io::duplex(64 * 1024);
        client.write_all(bytes).await.unwrap();
        client.shutdown().await.unwrap();
        let (mut seen, mut answer) = (Vec::new(), Vec::new());
        let mut server = guarded(io);
        while server.read_buf(&mut seen).await.unwrap() > 0 {
            server.write_all(OK).await.unwrap();
            server.flush().await.unwrap();
        }
        drop(server);
        client.read_to_end(&mut answer).await.unwrap();
        while let Some(rest) = answer.strip_prefix(OK) {
            answer = rest.to_vec();
        }
        (seen, answer)
    }

    const OK: &[u8] = b"HTTP/1.1 204 \r\n\r\n";

    const GET: &str = "GET /x HTTP/1.1\r\nHost: h\r\n";

    #[tokio::test]
    async fn good_requests_pass_unchanged() {
        let requests = [
            format!("{GET}\r\n"),
            format!("{GET}\r\n{GET}\r\n"),
            format!("{GET}Content-Length: 3\r\n\r\nabc{GET}\r\n"),
            format!("{GET}Content-Length: 12\r\n\r\nab\ncd\r\n\r\nefg{GET}\r\n"),
            format!("{GET}Upgrade: websocket\r\n\r\n\x01\x02 anything\n"),
            format!("{GET}X-Empty:\r\n\r\n"),
        ];
        for request in requests {
            let (seen, answer) = through(request.as_bytes()).await;
            assert_eq!(String::from_utf8_lossy(&seen), request);
            assert!(answer.is_empty(), "{request}");
        }
    }

    #[tokio::test]
    async fn what_two_parsers_could_read_differently_is_refused() {
        let bad = [
            "GET /x HTTP/1.1\nHost: h\n\n".to_owned(),
            "GET /x HTTP/1.1\r\nHost: h\n\r\n\r\n".into(),
            "GET /x HTTP/1.1\r\nHost: h\rX: y\r\n\r\n".into(),
            format!("{GET}X: a\r\n b\r\n\r\n"),
            format!("{GET}X: a\r\n\tb\r\n\r\n"),
            format!("{GET}Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
            format!("{GET}Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
            format!("{GET}Transfer-Encoding: chunked\r\nUpgrade: websocket\r\n\r\n0\r\n\r\n"),
            format!("{GET}Content-Length: 3\r\nUpgrade: websocket\r\n\r\nabc"),
            format!("{GET}Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nabc"),
            format!("{GET}Content-Length: 3\r\nTransfer-Encoding: xchunked\r\n\r\nabc"),
            format!("{GET}Transfer-Encoding : chunked\r\n\r\n"),
            format!("{GET}Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc"),
            format!("{GET}Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"),
            format!("{GET}Content-Length: 3, 3\r\n\r\nabc"),
            format!("{GET}Content-Length: +3\r\n\r\nabc"),
            format!("{GET}Content-Length: -1\r\n\r\n"),
            format!("{GET}Content-Length: 0x3\r\n\r\nabc"),
            format!("{GET}Content-Length:\r\n\r\n"),
            format!("{GET}Content-Length: 99999999999999999999\r\n\r\n"),
            format!("{GET}Content-Length : 3\r\n\r\nabc"),
            format!("{GET}No colon\r\n\r\n"),
            format!("{GET}: empty name\r\n\r\n"),
            format!("{GET}X: a\0b\r\n\r\n"),
            format!("{GET}X: \x1b[31m\r\n\r\n"),
            format!("{GET}Host: other\r\n\r\n"),
            "GET /x HTTP/1.1\r\n\r\n".into(),
            "GET /x HTTP/1.1\r\nHost:\r\n\r\n".into(),
            "GET /x HTTP/1.1\r\nHost: a b\r\n\r\n".into(),
            "GET /x HTTP/1.1\r\nHost: h/x\r\n\r\n".into(),
            "GET /x HTTP/1.1\r\nHost: user@h\r\n\r\n".into(),
            "GET /x#y HTTP/1.1\r\nHost: h\r\n\r\n".into(),
            "GET\t/x\tHTTP/1.1\r\nHost: h\r\n\r\n".into(),
            "GET /x HTTP/1.1 \r\nHost: h\r\n\r\n".into(),
            "GET /x HTTP/1.0\r\nHost: h\r\n\r\n".into(),
            "GET /x HTTP/2.0\r\nHost: h\r\n\r\n".into(),
            "GET /x\r\nHost: h\r\n\r\n".into(),
            "GET  /x HTTP/1.1\r\nHost: h\r\n\r\n".into(),
            "GET http://h/x HTTP/1.1\r\nHost: h\r\n\r\n".into(),
            "GET * HTTP/1.1\r\nHost: h\r\n\r\n".into(),
            "G\u{e9}T /x HTTP/1.1\r\nHost: h\r\n\r\n".into(),
            " GET /x HTTP/1.1\r\nHost: h\r\n\r\n".into(),
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into(),
        ];
        for request in bad {
            let (seen, answer) = through(request.as_bytes()).await;
            assert!(seen.is_empty(), "{request:?}");
            assert!(answer.starts_with(b"HTTP/1.1 400 "), "{request:?}");
        }
    }

    #[tokio::test]
    async fn a_body_in_chunks_is_asked_for_its_length() {
        let (seen, answer) = through(format!("{GET}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n").as_bytes()).await;
        assert!(seen.is_empty() && answer.starts_with(b"HTTP/1.1 411 "));
    }

    #[tokio::test]
    async fn large_heads_are_refused_before_they_are_held() {
        let one = format!("{GET}X: {}\r\n\r\n", "a".repeat(MAX_HEAD));
        let endless = "a".repeat(3 * MAX_HEAD);
        let many = format!("{GET}{}\r\n", "X: y\r\n".repeat(MAX_HEADERS));
        for request in [one, endless, many] {
            let (seen, answer) = through(request.as_bytes()).await;
            assert!(seen.is_empty());
            assert!(answer.starts_with(b"HTTP/1.1 431 "));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_that_trickles_is_cut_off() {
        let (mut client, io) = tokio::io::duplex(1024);
        let mut server = guarded(io);
        let began = Instant::now();
        let trickle = async {
            loop {
                client.write_all(b"G").await.unwrap();
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        let error = tokio::select! {
            read = server.read_u8() => read.unwrap_err(),
            () = trickle => unreachable!(),
        };
        assert_eq!((error.kind(), began.elapsed().as_secs()), (io::ErrorKind::TimedOut, 10));
    }

    #[tokio::test]
    async fn empty_lines_between_requests_are_skipped() {
        let (seen, answer) = through(format!("\r\n{GET}\r\n\r\n\r\n{GET}\r\n\r\n").as_bytes()).await;
        assert_eq!(String::from_utf8(seen).unwrap(), format!("{GET}\r\n{GET}\r\n"));
        assert!(answer.is_empty());
    }

    /// A guard that has handed a request over, whose client has sent `more` right behind it.
    async fn asked(more: &str) -> (tokio::io::DuplexStream, Guarded<tokio::io::DuplexStream>) {
        let (mut client, io) = tokio::io::duplex(64 * 1024);
        let request = format!("{GET}Content-Length: 2\r\n\r\nab");
        client.write_all(format!("{request}{more}").as_bytes()).await.unwrap();
        let mut server = guarded(io);
        let mut seen = vec![0; request.len()];
        server.read_exact(&mut seen).await.unwrap();
        assert_eq!(seen, request.as_bytes());
        (client, server)
    }

    #[tokio::test(start_paused = true)]
    async fn what_comes_behind_a_request_neither_ends_nor_overtakes_its_answer() {
        for more in ["\r\n", "GET", "GET bad\r\n\r\n"] {
            let (mut client, mut server) = asked(more).await;
            let minute = Duration::from_secs(60);
            assert!(tokio::time::timeout(minute, server.read_u8()).await.is_err(), "{more:?}");
            server.write_all(OK).await.unwrap();
            server.flush().await.unwrap();
            let began = Instant::now();
            let ended = tokio::time::timeout(minute, server.read_u8()).await.map(|read| read.unwrap_err().kind());
            drop(server);
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).await.unwrap();
            let own = answer.strip_prefix(OK).expect("the answer comes first");
            match more {
                "\r\n" => assert!(ended.is_err(), "nothing has begun"),
                "GET" => assert_eq!((ended, began.elapsed().as_secs()), (Ok(io::ErrorKind::TimedOut), 10)),
                _ => assert!(own.starts_with(b"HTTP/1.1 400 ")),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_leaves_is_noticed_while_its_answer_is_due() {
        let (client, mut server) = asked("GET /next").await;
        drop(client);
        assert_eq!(server.read_u8().await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_nobody_takes_is_cut_off() {
        let (_client, io) = tokio::io::duplex(16);
        let error = guarded(io).write_all(&[0; 64]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
