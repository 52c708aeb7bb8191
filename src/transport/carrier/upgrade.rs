//! From an HTTP/1.1 connection to a carrier, on the client's side.
//!
//! Owns the upgrade request and the check of its answer. Does not know DNS, proxies or TLS. Invariant: a carrier is
//! handed out only after a 101 that answers our key.

#[cfg(test)]
mod tests;

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::tungstenite::handshake::{client::generate_key, derive_accept_key};

use super::{Carrier, CarrierOptions};
use crate::{
    base::Secret,
    proto::websocket::End,
    transport::http::{
        clock_hint, connection,
        fuzz::{Scripted, block_on},
        read_body, retry_after,
    },
};

/// An upgrade is one round trip; a hub that needs longer is overloaded and should be asked later.
const UPGRADE_TIMEOUT: Duration = Duration::from_secs(10);
/// The body of a refusal is read up to here: enough for an error object.
const MAX_REFUSAL: usize = 16 * 1024;

/// An upgrade request.
#[derive(Debug, Clone, Copy)]
pub struct Upgrade<'a> {
    /// The Host header: name, and the port if it is not 443.
    pub host: &'a str,
    /// The path, with the query if any.
    pub path: &'a str,
    /// The sub-protocol to offer.
    pub subprotocol: Option<&'a str>,
    /// The bearer token.
    pub bearer: Option<&'a Secret>,
    /// The User-Agent header.
    pub user_agent: &'a str,
}

/// Why there is no carrier.
#[derive(Debug, thiserror::Error)]
pub enum UpgradeError {
    /// The server answered, but not with 101.
    #[error("the server answered {status} to the WebSocket upgrade{}{body}{}{hint}",
        if body.is_empty() { "" } else { ": " }, if hint.is_empty() { "" } else { "; " })]
    Refused {
        /// The HTTP status.
        status: StatusCode,
        /// How long to stay away, if the server said so.
        retry_after: Option<Duration>,
        /// The body, shortened and made printable.
        body: String,
        /// What may help, for a person; empty if nothing comes to mind.
        hint: String,
    },
    /// The answer is a 101 that breaks the rules.
    #[error("the answer to the WebSocket upgrade is wrong: {0}")]
    Wrong(&'static str),
    /// The request cannot be written as HTTP.
    #[error("the WebSocket upgrade cannot be written as HTTP")]
    Request(#[source] http::Error),
    /// The connection failed meanwhile.
    #[error("the connection ended during the WebSocket upgrade")]
    Connection(#[source] hyper::Error),
    /// No answer in time.
    #[error("no answer to the WebSocket upgrade within {} s", UPGRADE_TIMEOUT.as_secs())]
    Timeout,
}

impl UpgradeError {
    /// The HTTP status of a refusal.
    pub fn status(&self) -> Option<StatusCode> {
        if let Self::Refused { status, .. } = self { Some(*status) } else { None }
    }

    /// How long the server wants us to stay away.
    pub fn retry_after(&self) -> Option<Duration> {
        if let Self::Refused { retry_after, .. } = self { *retry_after } else { None }
    }

    /// True if the path failed, false if the server said no.
    pub fn is_path_failure(&self) -> bool {
        matches!(self, Self::Timeout | Self::Connection(_))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> Carrier<S> {
    /// Upgrades a connection to a carrier.
    pub async fn client(io: S, upgrade: &Upgrade<'_>, options: CarrierOptions) -> Result<Self, UpgradeError> {
        let key = generate_key();
        let request = upgrade.request(&key).map_err(UpgradeError::Request)?;
        let exchange = async {
            let (mut sender, driver) = connection(io).await.map_err(UpgradeError::Connection)?;
            let answer = async {
                let response = sender.send_request(request).await.map_err(UpgradeError::Connection)?;
                if response.status() != StatusCode::SWITCHING_PROTOCOLS {
                    return Err(refusal(response).await);
                }
                upgrade.check(response.headers(), &key)?;
                hyper::upgrade::on(response).await.map_err(UpgradeError::Connection)
            };
            driver.drive(answer).await
        };
        let upgraded = tokio::time::timeout(UPGRADE_TIMEOUT, exchange).await.map_err(|_| UpgradeError::Timeout)??;
        let parts = upgraded.downcast::<TokioIo<S>>().map_err(|_| UpgradeError::Wrong("a foreign transport"))?;
        Ok(Self::new(parts.io.into_inner(), parts.read_buf, End::Client, options))
    }
}

impl Upgrade<'_> {
    fn request(&self, key: &str) -> Result<Request<Empty<Bytes>>, http::Error> {
        let mut request = Request::get(self.path)
            .header(header::HOST, self.host)
            .header(header::CONNECTION, "Upgrade")
            .header(header::UPGRADE, "websocket")
            .header(header::SEC_WEBSOCKET_VERSION, "13")
            .header(header::SEC_WEBSOCKET_KEY, key)
            .header(header::USER_AGENT, self.user_agent);
        if let Some(subprotocol) = self.subprotocol {
            request = request.header(header::SEC_WEBSOCKET_PROTOCOL, subprotocol);
        }
        if let Some(token) = self.bearer {
            let mut value = HeaderValue::from_bytes(&[b"Bearer ", token.expose()].concat())?;
            value.set_sensitive(true);
            request = request.header(header::AUTHORIZATION, value);
        }
        request.body(Empty::new())
    }

    fn check(&self, headers: &HeaderMap, key: &str) -> Result<(), UpgradeError> {
        let value = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let tokens = |name| value(name).unwrap_or_default().split(',').map(str::trim);
        if !tokens(header::UPGRADE).any(|token| token.eq_ignore_ascii_case("websocket"))
            || !tokens(header::CONNECTION).any(|token| token.eq_ignore_ascii_case("upgrade"))
        {
            return Err(UpgradeError::Wrong("no Upgrade header"));
        }
        if value(header::SEC_WEBSOCKET_ACCEPT) != Some(derive_accept_key(key.as_bytes()).as_str()) {
            return Err(UpgradeError::Wrong("it answers another key"));
        }
        if headers.contains_key(header::SEC_WEBSOCKET_EXTENSIONS) {
            return Err(UpgradeError::Wrong("an extension that nobody offered"));
        }
        if value(header::SEC_WEBSOCKET_PROTOCOL) != self.subprotocol {
            return Err(UpgradeError::Wrong("another sub-protocol than offered"));
        }
        Ok(())
    }
}

/// Any bytes as the answer to an upgrade: never the right one, since nobody can know its key. For fuzzers.
///
/// # Panics
/// If a carrier comes of it, or what is printed of it drives a terminal.
pub fn fuzz_upgrade(data: &[u8]) {
    let upgrade =
        Upgrade { host: "hub", path: "/bridges/1", subprotocol: Some("mqtt"), bearer: None, user_agent: "culvert" };
    let options = CarrierOptions::HUB_CONTROL;
    let upgraded = block_on(Carrier::client(Scripted::saying(data), &upgrade, options));
    let error = upgraded.expect_err("the answer is to another key");
    assert!(!matches!(error, UpgradeError::Timeout), "the exchange ends with its server");
    assert!(!error.to_string().contains(char::is_control), "{error:?}");
}

async fn refusal(response: Response<Incoming>) -> UpgradeError {
    let status = response.status();
    let retry_after = retry_after(response.headers());
    let hint = match status {
        StatusCode::UNAUTHORIZED => clock_hint(response.headers()).unwrap_or_default(),
        _ => String::new(),
    };
    let body = read_body(response.into_body(), MAX_REFUSAL).await.unwrap_or_default();
    let body = String::from_utf8_lossy(&body).chars().filter(|c| !c.is_control()).take(500).collect();
    UpgradeError::Refused { status, retry_after, body, hint }
}
