//! The journal's native protocol: one datagram per event.
//!
//! Owns the fields and the message that the journal gets. Does not know what is logged.
//! Invariant: the message alone says everything that the fields say, because `systemctl status` and `journalctl` show
//! nothing else. (The crate `tracing-journald` leaves "device stream ended" without device and reason.)

use std::{
    fmt::{self, Write as _},
    io,
    os::unix::net::UnixDatagram,
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span::{Attributes, Id, Record},
};
use tracing_subscriber::{
    Layer,
    layer::Context,
    registry::{LookupSpan, SpanRef},
};

use super::log::Escaping;

/// Where the journal listens.
const SOCKET: &str = "/run/systemd/journal/socket";
/// Fields appear in the journal under this prefix: `journalctl CULVERT_DEVICE=pump-17`.
const PREFIX: &str = "CULVERT_";
/// What `journalctl -t` looks for.
const IDENTIFIER: &str = "culvert";
/// Longest message and longest field: far above what culvert logs, and together below a datagram's limit (the
/// kernel's `wmem_default`, 208 KiB), over which the journal wants a file descriptor instead.
const MAX_VALUE: usize = 16 << 10;

/// A journal that reads at all makes room within this time, after a burst that was longer than its queue. Whoever logs
/// waits for it, so it is short.
const BURST_WAIT: Duration = Duration::from_millis(20);

/// A layer that sends events to the journal. A journal that does not read loses lines; it holds up nobody.
pub(super) struct Journal {
    /// Never waits.
    socket: UnixDatagram,
    /// Waits for [`BURST_WAIT`].
    patient: UnixDatagram,
    path: PathBuf,
    /// Lines that were lost since the last one that got through.
    lost: AtomicU64,
}

impl Journal {
    /// Fails if no journal listens.
    pub(super) fn open() -> io::Result<Self> {
        Self::at(SOCKET.into())
    }

    fn at(path: PathBuf) -> io::Result<Self> {
        let (socket, patient) = (UnixDatagram::unbound()?, UnixDatagram::unbound()?);
        socket.set_nonblocking(true)?;
        patient.set_write_timeout(Some(BURST_WAIT))?;
        // The journal ignores an empty datagram. One whose queue is full is there.
        match socket.send_to(&[], &path) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(Self { socket, patient, path, lost: AtomicU64::new(0) }),
        }
    }

    /// Sends a line, behind the number of those that were lost before it. A log line that is lost is no reason to do
    /// anything else differently.
    fn send(&self, datagram: &[u8]) {
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0 && self.socket.send_to(&loss(lost), &self.path).is_err() {
            self.lost.fetch_add(lost + 1, Ordering::Relaxed);
            return;
        }
        let sent = match self.socket.send_to(datagram, &self.path) {
            // One that was stuck a moment ago gets no more of our time.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && lost == 0 => {
                self.patient.send_to(datagram, &self.path)
            }
            done => done,
        };
        if sent.is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// What the journal is told of lines that it did not take.
fn loss(lines: u64) -> Vec<u8> {
    let mut datagram = Vec::new();
    put(&mut datagram, "PRIORITY", b"4");
    put(&mut datagram, "SYSLOG_IDENTIFIER", IDENTIFIER.as_bytes());
    put(&mut datagram, "MESSAGE", format!("log lines that the journal did not take in time: {lines}").as_bytes());
    datagram
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Journal {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id) {
            let mut told = Told::default();
            attributes.record(&mut told);
            span.extensions_mut().insert(told);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(told) = span.extensions_mut().get_mut::<Told>()
        {
            values.record(told);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut datagram = Vec::with_capacity(512);
        put_metadata(&mut datagram, event.metadata());
        let mut message = String::new();
        for span in context.event_scope(event).into_iter().flat_map(|scope| scope.from_root()) {
            put_span(&mut datagram, &mut message, &span);
        }
        let mut told = Told::default();
        event.record(&mut told);
        datagram.extend_from_slice(&told.fields);
        message += &told.message;
        if !told.text.is_empty() && !told.message.is_empty() {
            message.push(' ');
        }
        message += &told.text;
        put(&mut datagram, "MESSAGE", message.as_bytes());
        self.send(&datagram);
    }
}

/// `tunnel{device=pump-17}: `, as in text logs.
fn put_span<'a, S: LookupSpan<'a>>(datagram: &mut Vec<u8>, message: &mut String, span: &SpanRef<'a, S>) {
    let extensions = span.extensions();
    let Some(told) = extensions.get::<Told>() else { return };
    datagram.extend_from_slice(&told.fields);
    *message += span.name();
    if !told.text.is_empty() {
        *message += "{";
        *message += &told.text;
        *message += "}";
    }
    *message += ": ";
}

fn put_metadata(datagram: &mut Vec<u8>, metadata: &Metadata<'_>) {
    // syslog's numbers: error, warning, informational, debug.
    let priority = match *metadata.level() {
        Level::ERROR => "3",
        Level::WARN => "4",
        Level::INFO => "6",
        Level::DEBUG | Level::TRACE => "7",
    };
    put(datagram, "PRIORITY", priority.as_bytes());
    put(datagram, "SYSLOG_IDENTIFIER", IDENTIFIER.as_bytes());
    put(datagram, "TARGET", metadata.target().as_bytes());
    if let Some(file) = metadata.file() {
        put(datagram, "CODE_FILE", file.as_bytes());
    }
    if let Some(line) = metadata.line() {
        put(datagram, "CODE_LINE", line.to_string().as_bytes());
    }
}

/// Name, newline, length (64 bits, little-endian), value, newline: no value can look like another field.
fn put(datagram: &mut Vec<u8>, name: &str, value: &[u8]) {
    let value = &value[..value.len().min(MAX_VALUE)];
    datagram.extend_from_slice(name.as_bytes());
    datagram.push(b'\n');
    datagram.extend_from_slice(&(value.len() as u64).to_le_bytes());
    datagram.extend_from_slice(value);
    datagram.push(b'\n');
}

/// What an event or a span says, twice.
#[derive(Default)]
struct Told {
    /// For programs: in the journal's encoding.
    fields: Vec<u8>,
    /// For people: `name=value`, control characters escaped.
    text: String,
    /// The event's own words.
    message: String,
}

impl Told {
    fn tell(&mut self, field: &Field, raw: &str, shown: &dyn fmt::Debug) {
        // Writing into a string cannot fail.
        if field.name() == "message" {
            let _ = write!(Escaping(&mut self.message), "{raw}");
            return;
        }
        let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
        let name: String = PREFIX.chars().chain(field.name().chars().map(plain)).collect();
        put(&mut self.fields, &name, raw.as_bytes());
        let space = if self.text.is_empty() { "" } else { " " };
        let _ = write!(self.text, "{space}{}=", field.name());
        let _ = write!(Escaping(&mut self.text), "{shown:?}");
    }
}

impl Visit for Told {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.tell(field, value, &value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.tell(field, &format!("{value:?}"), value);
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    #[test]
    fn the_message_says_what_the_fields_say_and_no_value_forges_one() {
        let path = std::env::temp_dir().join(format!("culvert-journal-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let journald = UnixDatagram::bind(&path).unwrap();
        let subscriber = tracing_subscriber::registry().with(Journal::at(path.clone()).unwrap());
        tracing::subscriber::with_default(subscriber, || {
            let span = tracing::info_span!("tunnel", device = %"pump-17", late = tracing::field::Empty);
            span.record("late", 1);
            let _inside = span.enter();
            tracing::warn!(reason = %"lost\nPRIORITY=0\u{1b}[2J", bytes = 7, "device stream ended");
        });
        let mut bytes = [0; 4096];
        assert_eq!(journald.recv(&mut bytes).unwrap(), 0, "is it there?");
        let length = journald.recv(&mut bytes).unwrap();
        std::fs::remove_file(&path).unwrap();
        let fields = parse(&bytes[..length]);
        let value = |name: &str| fields.iter().find(|field| field.0 == name).map(|field| field.1.as_str());
        let message = r"tunnel{device=pump-17 late=1}: device stream ended reason=lost\nPRIORITY=0\u{1b}[2J bytes=7";
        assert_eq!(value("MESSAGE"), Some(message));
        assert_eq!(value("PRIORITY"), Some("4"));
        assert_eq!(value("CULVERT_DEVICE"), Some("pump-17"));
        assert_eq!(value("CULVERT_REASON"), Some("lost\nPRIORITY=0\u{1b}[2J"));
        assert_eq!(value("CULVERT_BYTES"), Some("7"));
        assert_eq!(fields.iter().filter(|field| field.0 == "PRIORITY").count(), 1);
    }

    #[test]
    fn a_journal_that_does_not_read_holds_up_nobody_and_learns_what_it_missed() {
        const LINES: u64 = 5000;
        let path = std::env::temp_dir().join(format!("culvert-stuck-journal-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let journald = UnixDatagram::bind(&path).unwrap();
        let (begun, mut bytes) = (std::time::Instant::now(), [0; 4096]);
        let subscriber = tracing_subscriber::registry().with(Journal::at(path.clone()).unwrap());
        let mut message = move || {
            let length = journald.recv(&mut bytes).unwrap();
            let fields = parse(&bytes[..length]);
            fields.into_iter().find(|field| field.0 == "MESSAGE").map(|field| field.1)
        };
        tracing::subscriber::with_default(subscriber, || {
            (0..LINES).for_each(|line| tracing::info!(line, "a line"));
            assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
            assert_eq!(message(), None, "is it there?");
            assert_eq!(message().unwrap(), "a line line=0");
            tracing::info!("it reads again");
        });
        std::fs::remove_file(&path).unwrap();
        let told = std::iter::from_fn(&mut message).find(|text| !text.starts_with("a line")).unwrap();
        let lost: u64 =
            told.strip_prefix("log lines that the journal did not take in time: ").unwrap().parse().unwrap();
        assert!((1..LINES).contains(&lost), "{told}");
    }

    fn parse(mut datagram: &[u8]) -> Vec<(String, String)> {
        let mut fields = Vec::new();
        while let Some(end) = datagram.iter().position(|byte| *byte == b'\n') {
            let (name, rest) = (&datagram[..end], &datagram[end + 1..]);
            let (length, rest) = rest.split_first_chunk().unwrap();
            let (value, rest) = rest.split_at(u64::from_le_bytes(*length) as usize);
            fields.push((String::from_utf8_lossy(name).into(), String::from_utf8_lossy(value).into()));
            datagram = &rest[1..];
        }
        fields
    }
}
