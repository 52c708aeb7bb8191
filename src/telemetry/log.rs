//! Logs: text on a terminal, JSON or the journal otherwise.
//!
//! Owns the process-wide subscriber, its level, and the escaping of control characters. Does not know what is
//! logged. Invariant: one event is one line, whatever its fields contain.

use std::{
    fmt::{self, Write as _},
    io::{self, IsTerminal as _},
    os::unix::fs::MetadataExt as _,
};

use tracing::{Level, field::Field};
use tracing_subscriber::{
    Layer, Registry,
    field::MakeExt as _,
    filter::{LevelFilter, Targets},
    fmt::format::{Writer, debug_fn},
    layer::SubscriberExt as _,
    reload,
    util::SubscriberInitExt as _,
};

use super::journal::Journal;

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// Text on a terminal, the journal under systemd, JSON otherwise.
    #[default]
    Auto,
    /// One readable line per event.
    Text,
    /// One JSON object per event.
    Json,
    /// The journal's native protocol, with fields.
    Journald,
}

/// What is logged and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogOptions {
    /// `error`, `warn`, `info`, `debug` or `trace`; or a list such as `info,culvert::transport=debug`.
    pub level: String,
    /// The format of lines.
    pub format: LogFormat,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Auto }
    }
}

/// Why logging could not start or change.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The level is not one.
    #[error("log level {0:?} is not error, warn, info, debug, trace or a list such as \"info,culvert::hub=debug\"")]
    Level(String),
    /// The journal's socket cannot be used.
    #[error("the journal cannot be reached")]
    Journal(#[source] io::Error),
    /// Logging was started before in this process.
    #[error("logging is already running")]
    Running,
}

/// The running log: its level can change while the daemon runs.
#[derive(Clone)]
pub struct LogHandle {
    filter: reload::Handle<Targets, Registry>,
}

impl LogHandle {
    /// Logs at this level (or by this list) from now on.
    pub fn set_level(&self, level: &str) -> Result<(), LogError> {
        let targets = parse_level(level)?;
        self.filter.reload(targets).map_err(|_| LogError::Running)
    }
}

/// Starts logging to standard error (or the journal). Once per process.
pub fn init(options: &LogOptions) -> Result<LogHandle, LogError> {
    let (filter, handle) = reload::Layer::new(parse_level(&options.level)?);
    let (output, fell_back) = open(options.format)?;
    tracing_subscriber::registry().with(filter).with(output).try_init().map_err(|_| LogError::Running)?;
    if let Some(error) = fell_back {
        tracing::warn!(%error, "the journal's socket cannot be reached; logging to standard error");
    }
    Ok(LogHandle { filter: handle })
}

/// The output, and why it is not the journal if that was only the likeliest choice: without its socket, standard error
/// still leads there.
fn open(format: LogFormat) -> Result<(Output, Option<io::Error>), LogError> {
    match (format, output_layer(resolve(format))) {
        (LogFormat::Auto, Err(LogError::Journal(error))) => Ok((output_layer(LogFormat::Text)?, Some(error))),
        (_, output) => Ok((output?, None)),
    }
}

/// A bare level is for culvert's own events; libraries then speak up only to warn.
fn parse_level(text: &str) -> Result<Targets, LogError> {
    if let Ok(level) = text.trim().parse::<Level>() {
        let quiet = Targets::new().with_default(Level::WARN).with_target("culvert", level);
        return Ok(quiet.with_target(WARNS_IN_VAIN, Level::ERROR));
    }
    // A blank would become part of a target's name, which then is nobody's.
    let list = text.split(',').map(str::trim).collect::<Vec<_>>().join(",");
    list.parse().map(without_payload).map_err(|_| LogError::Level(text.into()))
}

/// A library that warns of a watched folder that was removed, which is the operator's right and no matter: whoever asks
/// for it by name gets it.
const WARNS_IN_VAIN: &str = "notify";

/// Libraries that print what they carry when they trace: tickets and tokens, and people's connections.
const PRINTS_PAYLOAD: [&str; 2] = ["tungstenite", "tokio_tungstenite"];

/// The same filter, but these libraries never below debug, whatever an operator asks for.
fn without_payload(asked: Targets) -> Targets {
    let is_theirs = |target: &str| PRINTS_PAYLOAD.iter().any(|name| target.starts_with(name));
    let highest = LevelFilter::DEBUG;
    let default = asked.default_level().unwrap_or(LevelFilter::OFF);
    let capped = PRINTS_PAYLOAD.map(|name| (name.to_owned(), default.min(highest)));
    let listed = asked.into_iter().map(|(target, level)| {
        let level = if is_theirs(&target) { level.min(highest) } else { level };
        (target, level)
    });
    // Later entries replace earlier ones of the same name.
    Targets::new()
        .with_default(default)
        .with_target(WARNS_IN_VAIN, default.min(LevelFilter::ERROR))
        .with_targets(capped)
        .with_targets(listed)
}

type Filtered = tracing_subscriber::layer::Layered<reload::Layer<Targets, Registry>, Registry>;
type Output = Box<dyn Layer<Filtered> + Send + Sync>;

fn output_layer(format: LogFormat) -> Result<Output, LogError> {
    let base = tracing_subscriber::fmt::layer().with_writer(io::stderr).log_internal_errors(false);
    Ok(match format {
        LogFormat::Json => Box::new(base.json().with_current_span(false)),
        LogFormat::Journald => Box::new(Journal::open().map_err(LogError::Journal)?),
        LogFormat::Auto | LogFormat::Text => {
            Box::new(base.with_ansi(io::stderr().is_terminal()).fmt_fields(debug_fn(write_field).delimited(" ")))
        }
    })
}

fn resolve(format: LogFormat) -> LogFormat {
    match format {
        LogFormat::Auto if io::stderr().is_terminal() => LogFormat::Text,
        LogFormat::Auto if stderr_is_the_journal() => LogFormat::Journald,
        LogFormat::Auto => LogFormat::Json,
        chosen => chosen,
    }
}

/// systemd names the journal's device and inode in `$JOURNAL_STREAM`; a redirected stderr does not match.
pub(crate) fn stderr_is_the_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    std::fs::metadata("/proc/self/fd/2").is_ok_and(|file| stream == format!("{}:{}", file.dev(), file.ino()))
}

/// Text fields: `message` bare, others as `name=value`, control characters escaped in all of them.
fn write_field(writer: &mut Writer<'_>, field: &Field, value: &dyn fmt::Debug) -> fmt::Result {
    if field.name() != "message" {
        write!(writer, "{}=", field.name())?;
    }
    write!(Escaping(writer), "{value:?}")
}

/// Passes text on with every control character as its Rust escape, so that no field can forge a line or
/// drive a terminal.
pub(super) struct Escaping<'a, W>(pub(super) &'a mut W);

impl<W: fmt::Write> fmt::Write for Escaping<'_, W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for piece in text.split_inclusive(is_unsafe) {
            match piece.chars().next_back().filter(|last| is_unsafe(*last)) {
                None => self.0.write_str(piece)?,
                Some(last) => {
                    self.0.write_str(&piece[..piece.len() - last.len_utf8()])?;
                    write!(self.0, "{}", last.escape_default())?;
                }
            }
        }
        Ok(())
    }
}

/// Controls, and the characters that reorder or break a line on a terminal.
fn is_unsafe(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn no_field_breaks_a_line_or_drives_a_terminal() {
        let sink = Sink::default();
        let writer = sink.clone();
        let layer = tracing_subscriber::fmt::layer()
            .with_writer(move || writer.clone())
            .with_ansi(false)
            .fmt_fields(debug_fn(write_field).delimited(" "));
        let subscriber = tracing_subscriber::registry().with(layer);
        tracing::subscriber::with_default(subscriber, || {
            let evil = "a\r\nFORGED\u{1b}[2J\u{202e}";
            let span = tracing::info_span!("flow", peer = %evil);
            let _inside = span.enter();
            tracing::info!(reason = %evil, quoted = evil, "closed {evil}");
        });
        let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text.lines().count(), 1, "{text:?}");
        assert!(!text.trim_end().contains(is_unsafe), "{text:?}");
        assert!(text.contains(r"closed a\r\nFORGED\u{1b}[2J"), "{text:?}");
    }

    #[test]
    fn a_bare_level_is_for_culvert_only() {
        let targets = parse_level("debug").unwrap();
        assert!(targets.would_enable("culvert::hub", &Level::DEBUG));
        assert!(!targets.would_enable("hyper", &Level::INFO));
        assert!(targets.would_enable("hyper", &Level::WARN));
        let list = parse_level("info,culvert::hub=trace").unwrap();
        assert!(list.would_enable("culvert::hub", &Level::TRACE) && !list.would_enable("culvert", &Level::DEBUG));
        assert!(parse_level("culvert=loud").is_err());
        let spaced = parse_level(" warn, culvert=debug ").unwrap();
        assert!(spaced.would_enable("culvert::hub", &Level::DEBUG) && !spaced.would_enable("hyper", &Level::INFO));
        assert!(parse_level("info ").is_ok());
    }

    #[test]
    fn a_removed_folder_is_no_warning_unless_it_is_asked_for() {
        let warns = |level: &str| parse_level(level).unwrap().would_enable("notify::inotify", &Level::WARN);
        assert!(!warns("info") && !warns("info,culvert=debug"));
        assert!(warns("info,notify=warn"));
    }

    #[test]
    fn no_level_makes_a_library_print_what_it_carries() {
        for level in ["trace", "trace,culvert=debug", "tungstenite=trace", "tungstenite::protocol=trace,info"] {
            let targets = parse_level(level).unwrap();
            assert!(!targets.would_enable("tungstenite::protocol", &Level::TRACE), "{level}");
        }
        assert!(parse_level("trace,tungstenite=warn").unwrap().would_enable("hyper", &Level::TRACE));
        assert!(!parse_level("trace,tungstenite=warn").unwrap().would_enable("tungstenite::protocol", &Level::DEBUG));
    }
}
