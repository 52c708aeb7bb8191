//! A small HTTP/1.1 client over TLS: one request, one connection.
//!
//! Owns the exchange and its limits. Does not know what is asked: the service API, the registry. Invariant: an answer
//! has arrived whole, or there is an error.

mod clock;
pub(super) mod fuzz;
#[cfg(test)]
mod tests;

use std::{
    fmt,
    str::FromStr,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    body::{Body, Incoming},
    client::conn::http1,
};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use super::dial::{DialError, Dialer};

pub use fuzz::{fuzz_answer, fuzz_url};

/// An answer's body: a page of a device list is far below.
const MAX_BODY: usize = 1 << 20;
/// An answer's head (hyper's floor is 8 KiB).
const MAX_HEAD: usize = 16 * 1024;
/// An answer's header fields.
const MAX_HEADERS: usize = 64;

/// An `https`, or `wss`, URL: the only kinds that we open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Url {
    /// Host name or address, without brackets.
    pub host: String,
    /// Port; 443 if the URL names none.
    pub port: u16,
    /// Path with query; `/` if the URL has none.
    pub path: String,
}

/// Why a text is not a URL that we open.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an https or wss URL")]
pub struct UrlError(String);

impl FromStr for Url {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let error = || UrlError(text.to_owned());
        let uri: http::Uri = text.parse().map_err(|_| error())?;
        let authority = uri.authority().ok_or_else(error)?;
        let is_ours = matches!(uri.scheme_str(), Some("https" | "wss"));
        let host = host_of(authority).filter(|_| is_ours).ok_or_else(error)?;
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        // `wss://host?query` has a query and no path.
        let slash = if path.starts_with('/') { "" } else { "/" };
        Ok(Self {
            host: host.to_owned(),
            port: port_of(authority, 443).ok_or_else(error)?,
            path: format!("{slash}{path}"),
        })
    }
}

impl Url {
    /// The value of the Host header.
    pub fn host_header(&self) -> String {
        host_header(&self.host, self.port)
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "https://{}{}", self.host_header(), self.path)
    }
}

/// The host of an authority: a name or IPv4 address, or what stands in brackets if that is an IPv6 address. (The crate
/// takes other characters too.)
fn host_of(authority: &http::uri::Authority) -> Option<&str> {
    let host = authority.host();
    match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').filter(|address| address.parse::<std::net::Ipv6Addr>().is_ok()),
        None => {
            let in_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
            Some(host).filter(|host| !host.is_empty() && host.bytes().all(in_name))
        }
    }
}

/// The port of an authority, `default` if it names none. (The crate's own accessors take `host:nonsense` for one that
/// names none.)
pub(super) fn port_of(authority: &http::uri::Authority, default: u16) -> Option<u16> {
    match authority.as_str().strip_prefix(authority.host())? {
        "" => Some(default),
        named => named.strip_prefix(':')?.parse().ok().filter(|port| *port != 0),
    }
}

/// The value of the Host header: with the port unless it is 443.
pub fn host_header(host: &str, port: u16) -> String {
    let bracketed = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    if port == 443 { bracketed } else { format!("{bracketed}:{port}") }
}

/// A request.
#[derive(Debug, Clone)]
pub struct HttpRequest {
    /// The method.
    pub method: Method,
    /// Whom and what.
    pub url: Url,
    /// Header fields; Host and Content-Length are ours.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// The body.
    pub body: Bytes,
    /// For everything: DNS, connection, TLS, the answer's last byte.
    pub timeout: Duration,
}

/// An answer.
#[derive(Debug, Clone)]
pub struct HttpResponse {
    /// The status.
    pub status: StatusCode,
    /// Its header fields.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
}

impl HttpResponse {
    /// A header field as text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// How long the server wants us to stay away.
    pub fn retry_after(&self) -> Option<Duration> {
        retry_after(&self.headers)
    }

    /// What to tell a person whose credentials were refused while this machine's clock differs from the server's.
    pub fn clock_hint(&self) -> Option<String> {
        clock_hint(&self.headers)
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// No connection.
    #[error("cannot reach {host}")]
    Dial {
        /// Whom.
        host: String,
        /// Why.
        #[source]
        source: Box<DialError>,
    },
    /// Not in time.
    #[error("{host} did not answer within {} s", .after.as_secs())]
    Timeout {
        /// Whom.
        host: String,
        /// The limit.
        after: Duration,
    },
    /// The connection failed, or what came is not HTTP.
    #[error("{host} broke off the exchange")]
    Exchange {
        /// Whom.
        host: String,
        /// Why.
        #[source]
        source: hyper::Error,
    },
    /// The answer's body is larger than we take, or was cut off.
    #[error("the answer of {host} is cut off, or longer than {MAX_BODY} bytes")]
    Body {
        /// Whom.
        host: String,
    },
    /// The request cannot be written as HTTP.
    #[error("the request cannot be written as HTTP")]
    Request(#[source] http::Error),
}

impl HttpError {
    /// True if nothing listens at the server's address.
    pub fn is_refused(&self) -> bool {
        matches!(self, Self::Dial { source, .. } if source.is_refused())
    }

    /// True if the path failed: another attempt soon may succeed.
    pub fn is_path_failure(&self) -> bool {
        match self {
            Self::Dial { source, .. } => source.is_path_failure(),
            Self::Timeout { .. } | Self::Exchange { .. } | Self::Body { .. } => true,
            Self::Request(_) => false,
        }
    }
}

/// Sends one request over a connection of its own.
pub async fn request(dialer: &Dialer, request: HttpRequest) -> Result<HttpResponse, HttpError> {
    request_noting(dialer, request, || {}).await
}

/// The same, and calls `reached` once the server has proved its name: from then on it is the server that is slow.
pub async fn request_noting(
    dialer: &Dialer,
    request: HttpRequest,
    reached: impl FnOnce() + Send,
) -> Result<HttpResponse, HttpError> {
    let host = request.url.host.clone();
    let after = request.timeout;
    let exchange = async {
        let dialled = dialer.connect(&request.url.host, request.url.port, None).await;
        let io = dialled.map_err(|source| HttpError::Dial { host: host.clone(), source: Box::new(source) })?;
        reached();
        exchange(io, request, &host).await
    };
    let answered = tokio::time::timeout(after, exchange).await;
    answered.unwrap_or_else(|_| Err(HttpError::Timeout { host: host.clone(), after }))
}

async fn exchange<S>(io: S, request: HttpRequest, host: &str) -> Result<HttpResponse, HttpError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let failed = |source| HttpError::Exchange { host: host.to_owned(), source };
    // RFC 9110, section 8.6: a method that expects content says so when there is none. hyper leaves it out.
    let says_none = request.body.is_empty() && matches!(request.method, Method::POST | Method::PUT | Method::PATCH);
    let mut head = Request::builder()
        .method(request.method)
        .uri(&request.url.path)
        .header(header::HOST, request.url.host_header())
        .header(header::CONNECTION, "close");
    if says_none {
        head = head.header(header::CONTENT_LENGTH, 0);
    }
    for (name, value) in request.headers {
        head = head.header(name, value);
    }
    let message = head.body(Full::new(request.body)).map_err(HttpError::Request)?;
    let (mut sender, driver) = connection(io).await.map_err(failed)?;
    let answer = async {
        let response = sender.send_request(message).await.map_err(failed)?;
        let (head, body) = response.into_parts();
        let body = read_body(body, MAX_BODY).await.ok_or_else(|| HttpError::Body { host: host.to_owned() })?;
        Ok(HttpResponse { status: head.status, headers: head.headers, body })
    };
    driver.drive(answer).await
}

/// The other half of a client connection: it moves the bytes while somebody waits for an answer.
pub(super) struct Driver<S, B>(http1::Connection<TokioIo<S>, B>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    B: Body + 'static;

/// An HTTP/1.1 connection over `io`.
pub(super) async fn connection<S, B>(io: S) -> Result<(http1::SendRequest<B>, Driver<S, B>), hyper::Error>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    B: Body + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let (sender, connection) = http1::Builder::new()
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_HEADERS)
        .title_case_headers(true)
        .handshake(TokioIo::new(io))
        .await?;
    Ok((sender, Driver(connection)))
}

impl<S, B> Driver<S, B>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// Moves bytes until `answer` is there.
    pub(super) async fn drive<T>(self, answer: impl Future<Output = T>) -> T {
        let mut connection = std::pin::pin!(self.0.with_upgrades());
        let mut answer = std::pin::pin!(answer);
        tokio::select! {
            biased;
            // When the connection ends first, the answer learns what it must from its own side of hyper.
            _ = &mut connection => answer.await,
            value = &mut answer => value,
        }
    }
}

/// A whole body of at most `limit` bytes.
pub(super) async fn read_body(body: Incoming, limit: usize) -> Option<Bytes> {
    Limited::new(body, limit).collect().await.ok().map(|body| body.to_bytes())
}

/// [`HttpResponse::clock_hint`] for a head that is not kept.
pub(super) fn clock_hint(headers: &HeaderMap) -> Option<String> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    clock::skew_hint(headers, now.as_secs())
}

/// The Retry-After header, in seconds (its date form is not used between daemons and hub).
pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}
