//! HTTP CONNECT proxies: which one, and how to ask it.
//!
//! Owns the proxy's address and credentials, the environment's and the file's way to name it, the exceptions, and the
//! CONNECT exchange. Does not know TLS. Invariant: not one byte behind the proxy's answer is consumed, and no password
//! is ever printed.

use std::{fmt, io, net::IpAddr, str::FromStr, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use percent_encoding::percent_decode_str;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::{base::Secret, transport::http::port_of};

/// The head of a proxy's answer: the same limit as for every HTTP head we read.
const MAX_ANSWER: usize = 16 * 1024;
/// The port of a proxy that names none, as curl has it.
const DEFAULT_PORT: u16 = 1080;

/// An HTTP proxy that is asked with CONNECT. Prints without credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proxy {
    /// Its name or address, without brackets.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// User name and password, if it wants them.
    pub credentials: Option<(String, Secret)>,
}

/// Why a text does not name a proxy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProxySyntaxError {
    /// Not a URL of the right form. The text is not repeated: it may hold a password.
    #[error("not a proxy; write \"http://host:port\" or \"http://user@host:port\"")]
    Form,
    /// Another kind of proxy.
    #[error("a proxy of kind {0:?} is not supported; only \"http://\" proxies (CONNECT) are")]
    Kind(String),
}

/// Why the proxy did not connect us.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// It wants credentials, or others.
    #[error("wants {} (407{})", if *.sent { "other credentials: user name or password is wrong" } else { "credentials: set proxy = \"http://USER@HOST:PORT\" and proxy_password_file" }, if schemes.is_empty() { String::new() } else { format!("; it takes {schemes}") })]
    Credentials {
        /// We sent some.
        sent: bool,
        /// What it takes.
        schemes: String,
    },
    /// It says no.
    #[error("refused to connect to {target}: {status}{}", hint(*code))]
    Refused {
        /// Whom we asked for.
        target: String,
        /// The code of its answer.
        code: u16,
        /// Its answer's status line.
        status: String,
    },
    /// It does not speak HTTP.
    #[error("does not answer as an HTTP proxy does: {0}")]
    NotProxy(String),
    /// It did not answer in time.
    #[error("did not answer within {} s", .0.as_secs())]
    Timeout(Duration),
    /// The connection to it failed.
    #[error("ended the connection: {0}")]
    Io(#[source] io::Error),
}

impl ProxyError {
    /// True if the path failed, false if the proxy said no.
    pub fn is_path_failure(&self) -> bool {
        match self {
            Self::Timeout(_) | Self::Io(_) => true,
            // "Bad gateway", "gateway timeout": what lies behind the proxy did not answer.
            Self::Refused { code, .. } => matches!(code, 502 | 504),
            Self::Credentials { .. } | Self::NotProxy(_) => false,
        }
    }
}

fn hint(code: u16) -> &'static str {
    match code {
        403 | 405 => " (its rules forbid it: ask its administrator to allow CONNECT to this host and port)",
        502..=504 => " (it cannot reach or resolve that host)",
        _ => "",
    }
}

impl FromStr for Proxy {
    type Err = ProxySyntaxError;

    fn from_str(text: &str) -> Result<Self, ProxySyntaxError> {
        let rest = match text.split_once("://") {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => rest,
            Some((scheme, _)) => return Err(ProxySyntaxError::Kind(scheme.to_owned())),
            None => text,
        };
        let rest = rest.trim_end_matches('/');
        let (user, address) = match rest.rsplit_once('@') {
            Some((user, address)) => (Some(user), address),
            None => (None, rest),
        };
        let authority: http::uri::Authority = address.parse().map_err(|_| ProxySyntaxError::Form)?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() {
            return Err(ProxySyntaxError::Form);
        }
        let port = port_of(&authority, DEFAULT_PORT).ok_or(ProxySyntaxError::Form)?;
        let credentials = user.map(|user| {
            let (name, password) = user.split_once(':').unwrap_or((user, ""));
            let password: Vec<u8> = percent_decode_str(password).collect();
            (percent_decode_str(name).decode_utf8_lossy().into_owned(), Secret::new(password))
        });
        Ok(Self { host: host.to_owned(), port, credentials })
    }
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bracketed = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        write!(f, "http://{bracketed}:{}", self.port)
    }
}

impl Proxy {
    /// The same proxy with this password for its user.
    #[must_use]
    pub fn with_password(mut self, password: Secret) -> Self {
        if let Some((_, current)) = &mut self.credentials {
            *current = password;
        }
        self
    }

    /// Asks the proxy at the other end of `io` for a connection to `host:port`.
    pub(super) async fn ask<IO>(&self, io: &mut IO, host: &str, port: u16) -> Result<(), ProxyError>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let target = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        let mut request = zeroize::Zeroizing::new(format!(
            "CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nUser-Agent: culvert/{}\r\n",
            env!("CARGO_PKG_VERSION")
        ));
        if let Some((user, password)) = &self.credentials {
            let pair = zeroize::Zeroizing::new([user.as_bytes(), b":", password.expose()].concat());
            let encoded = zeroize::Zeroizing::new(BASE64_STANDARD.encode(&*pair));
            request.push_str("Proxy-Authorization: Basic ");
            request.push_str(&encoded);
            request.push_str("\r\n");
        }
        request.push_str("\r\n");
        io.write_all(request.as_bytes()).await.map_err(ProxyError::Io)?;
        io.flush().await.map_err(ProxyError::Io)?;
        let head = read_head(io).await?;
        self.judge(&head, target)
    }

    fn judge(&self, head: &str, target: String) -> Result<(), ProxyError> {
        let mut lines = head.lines();
        let line = lines.next().unwrap_or_default();
        let code = line
            .strip_prefix("HTTP/1.")
            .and_then(|rest| rest.get(2..5)?.parse::<u16>().ok())
            .ok_or_else(|| ProxyError::NotProxy(printable(line)))?;
        match code {
            200..=299 => Ok(()),
            407 => {
                let schemes = lines
                    .filter_map(|line| line.split_once(':'))
                    .filter(|(name, _)| name.eq_ignore_ascii_case("proxy-authenticate"))
                    .filter_map(|(_, value)| value.split_whitespace().next().map(printable));
                let schemes = schemes.collect::<Vec<_>>().join(", ");
                Err(ProxyError::Credentials { sent: self.credentials.is_some(), schemes })
            }
            code => {
                let status = line.split_once(' ').map_or(line, |(_, status)| status);
                Err(ProxyError::Refused { target, code, status: printable(status) })
            }
        }
    }
}

/// Reads up to the empty line and not one byte further: what follows belongs to TLS. Byte by byte, once per
/// connection.
async fn read_head<IO: AsyncRead + Unpin>(io: &mut IO) -> Result<String, ProxyError> {
    let mut head = Vec::with_capacity(256);
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() >= MAX_ANSWER {
            return Err(ProxyError::NotProxy(format!("no end of its header within {MAX_ANSWER} bytes")));
        }
        head.push(io.read_u8().await.map_err(ProxyError::Io)?);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

/// Any bytes as a proxy's answer: it is judged, and nothing that is printed of it drives a terminal. For fuzzers.
///
/// # Panics
/// If control characters get into the error.
pub fn fuzz_proxy_answer(data: &[u8]) {
    let proxy = Proxy { host: "proxy".into(), port: 3128, credentials: None };
    if let Err(error) = proxy.judge(&String::from_utf8_lossy(data), "hub:443".into()) {
        assert!(!error.to_string().contains(|c: char| c.is_control()), "{error:?}");
    }
}

fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(120).collect()
}

/// Which proxy, if any, leads to which host.
#[derive(Debug, Clone, Default)]
pub struct ProxyRules {
    proxy: Option<Proxy>,
    exceptions: NoProxy,
}

impl ProxyRules {
    /// No proxy at all.
    pub fn none() -> Self {
        Self::default()
    }

    /// This proxy, except for the hosts of `exceptions`.
    pub fn new(proxy: Proxy, exceptions: NoProxy) -> Self {
        Self { proxy: Some(proxy), exceptions }
    }

    /// What `HTTPS_PROXY` or `ALL_PROXY`, and `NO_PROXY`, say (or their lower-case spellings). This machine itself is
    /// never reached through a proxy.
    pub fn from_environment(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, ProxySyntaxError> {
        let either = |name: &str| {
            let value = lookup(&name.to_lowercase()).or_else(|| lookup(name));
            value.filter(|value| !value.trim().is_empty())
        };
        let Some(proxy) = either("HTTPS_PROXY").or_else(|| either("ALL_PROXY")) else { return Ok(Self::none()) };
        let mut exceptions = NoProxy::parse(&either("NO_PROXY").unwrap_or_default());
        exceptions.loopback = true;
        Ok(Self::new(proxy.trim().parse()?, exceptions))
    }

    /// The proxy that leads to `host:port`.
    pub fn proxy_for(&self, host: &str, port: u16) -> Option<&Proxy> {
        self.proxy.as_ref().filter(|_| !self.exceptions.covers(host, port))
    }
}

/// Hosts that are reached without the proxy.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NoProxy {
    patterns: Vec<Pattern>,
    loopback: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Pattern {
    Everything,
    /// This name and all below it, lower-case, without a leading dot; with a port if only that one is meant.
    Domain(String, Option<u16>),
    /// Addresses with this prefix length in common.
    Network(IpAddr, u8),
}

impl NoProxy {
    /// The usual comma-separated list: `*`, names (with everything below them), addresses, networks such as
    /// `10.0.0.0/8`, each name optionally with a port. What cannot be understood is skipped, as everywhere.
    pub fn parse(list: &str) -> Self {
        Self { patterns: list.split([',', ' ']).filter_map(Pattern::parse).collect(), loopback: false }
    }

    /// True if `host:port` is reached directly.
    pub fn covers(&self, host: &str, port: u16) -> bool {
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        let address: Option<IpAddr> = host.parse().ok().map(|address: IpAddr| address.to_canonical());
        let is_loopback = host == "localhost" || address.is_some_and(|address| address.is_loopback());
        (self.loopback && is_loopback)
            || self.patterns.iter().any(|pattern| match pattern {
                Pattern::Everything => true,
                Pattern::Domain(domain, only) => {
                    let below = host.strip_suffix(domain.as_str());
                    let matches = below.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
                    matches && only.is_none_or(|only| only == port)
                }
                Pattern::Network(network, length) => {
                    address.is_some_and(|address| shares_prefix(*network, address, *length))
                }
            })
    }
}

impl Pattern {
    fn parse(text: &str) -> Option<Self> {
        let text = text.trim().trim_start_matches("*.").trim_start_matches('.').to_ascii_lowercase();
        if text == "*" {
            return Some(Self::Everything);
        }
        if let Some((network, length)) = text.split_once('/') {
            return Some(Self::Network(network.parse().ok()?, length.parse().ok()?));
        }
        if let Ok(address) = text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
            return Some(Self::Network(address, 128));
        }
        let (name, port) = match text.rsplit_once(':') {
            Some((name, port)) => (name, Some(port.parse().ok()?)),
            None => (text.as_str(), None),
        };
        (!name.is_empty()).then(|| Self::Domain(name.to_owned(), port))
    }
}

fn shares_prefix(network: IpAddr, address: IpAddr, length: u8) -> bool {
    let prefix = |bits: u128, width: u32| match u32::from(length).min(width) {
        0 => 0,
        length => bits >> (width - length),
    };
    match (network, address) {
        (IpAddr::V4(a), IpAddr::V4(b)) => prefix(a.to_bits().into(), 32) == prefix(b.to_bits().into(), 32),
        (IpAddr::V6(a), IpAddr::V6(b)) => prefix(a.to_bits(), 128) == prefix(b.to_bits(), 128),
        _ => false,
    }
}
