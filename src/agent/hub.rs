//! The hub, as a daemon sees it: where it is, what to trust, how to prove who one is.
//!
//! Owns the credential and the dialler made from a configuration, and the two ways of talking to the hub: a request,
//! and a carrier. Does not know when to talk. Invariant: a token is signed for each use and never kept; a ticket goes
//! to the URL it came with and nowhere else.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, StatusCode, header};

use super::Failure;
use crate::{
    auth::{ConnectionString, Credential, Owner, sas},
    base::{Identity, Name, Secret, Utc},
    config::{Certificate, FileContents, Proxy as ProxySettings, ProxyRule},
    transport::{
        carrier::{Carrier, CarrierOptions, Upgrade, UpgradeError},
        dial::{DialError, Dialer, NoProxy, Proxy, ProxyRules, ProxySyntaxError},
        http::{HttpError, HttpRequest, HttpResponse, Url, UrlError, host_header, request_noting},
        net::CarrierSocket,
        tls::{ClientCertificate, ClientStream, ClientTls, TlsError, Trust},
    },
};

/// How long a token is valid, in seconds: what the SDKs use.
pub const TOKEN_LIFETIME: u64 = 3600;
/// A difference between the hub's clock and ours that is worth telling, in seconds.
const NOTABLE_SKEW: u64 = 120;

/// A carrier to the hub.
pub type HubCarrier = Carrier<ClientStream<CarrierSocket>>;

/// Why a configuration does not lead to a hub.
#[derive(Debug, thiserror::Error)]
pub enum HubSetupError {
    /// Trust or certificate.
    #[error("{0}")]
    Tls(#[from] TlsError),
    /// The environment's proxy.
    #[error("HTTPS_PROXY: {0}")]
    Proxy(#[from] ProxySyntaxError),
}

/// Why there is no carrier.
#[derive(Debug, thiserror::Error)]
pub enum CarrierFailure {
    /// The hub handed out a URL that we do not open.
    #[error("the hub handed out a URL that cannot be opened: {0}")]
    Url(#[from] UrlError),
    /// No connection.
    #[error("{0}")]
    Dial(#[from] DialError),
    /// No upgrade.
    #[error("{0}")]
    Upgrade(#[from] UpgradeError),
}

impl CarrierFailure {
    /// What it means for the next attempt.
    pub fn failure(&self) -> Failure {
        match self {
            Self::Dial(error) if error.is_path_failure() => Failure::Path,
            Self::Dial(error) if error.is_refused() => Failure::Refused,
            Self::Upgrade(error) if error.is_path_failure() => Failure::Path,
            Self::Upgrade(error) => Failure::Answered(error.retry_after()),
            Self::Dial(_) | Self::Url(_) => Failure::Answered(None),
        }
    }
}

/// A hub and our standing with it. Cheap to clone.
#[derive(Clone)]
pub struct HubClient {
    shared: Arc<Shared>,
}

struct Shared {
    connection: ConnectionString,
    dialer: Dialer,
    user_agent: String,
}

impl HubClient {
    /// Builds the client from a configuration's parts. Reads no network.
    pub fn new(
        connection: &ConnectionString,
        ca: Option<&FileContents>,
        certificate: Option<&Certificate>,
        proxy: &ProxyRule,
    ) -> Result<Self, HubSetupError> {
        let trust = ca.map_or(Trust::System, |file| Trust::Pem(file.contents.clone()));
        let certificate = certificate.map(|files| ClientCertificate {
            certificate_file: files.certificate.path.clone(),
            private_key_file: files.private_key.path.clone(),
        });
        let proxies = match proxy {
            ProxyRule::Environment => ProxyRules::from_environment(|name| std::env::var(name).ok())?,
            ProxyRule::Off => ProxyRules::none(),
            ProxyRule::Via(settings) => ProxyRules::new(via(settings), NoProxy::default()),
        };
        let dialer = Dialer::new(ClientTls::new(&trust, certificate.as_ref())?, proxies);
        Ok(Self::with_dialer(connection.clone(), dialer))
    }

    /// A client that dials as told.
    pub fn with_dialer(connection: ConnectionString, dialer: Dialer) -> Self {
        let role = match connection.owner {
            Owner::Device(_) => "device",
            Owner::Policy(_) => "service",
        };
        let user_agent = format!("culvert-{role}/{}", env!("CARGO_PKG_VERSION"));
        Self { shared: Arc::new(Shared { connection, dialer, user_agent }) }
    }

    /// True if both are clones of one client.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    /// `culvert-ROLE/VERSION`, by which the hub knows that it may use our extensions.
    pub fn user_agent(&self) -> &str {
        &self.shared.user_agent
    }

    /// Who we are.
    pub fn connection(&self) -> &ConnectionString {
        &self.shared.connection
    }

    /// The hub's name and port, for messages.
    pub fn name(&self) -> String {
        host_header(self.shared.connection.dial_host(), self.shared.connection.port)
    }

    /// The policy under which we act, if we are a service.
    pub fn policy(&self) -> Option<&Name> {
        match &self.shared.connection.owner {
            Owner::Policy(policy) => Some(policy),
            Owner::Device(_) => None,
        }
    }

    /// The identity as which we act, if we are a device.
    pub fn identity(&self) -> Option<&Identity> {
        match &self.shared.connection.owner {
            Owner::Device(identity) => Some(identity),
            Owner::Policy(_) => None,
        }
    }

    /// A token signed now, valid for [`TOKEN_LIFETIME`]; none for X.509.
    pub fn token(&self) -> Option<Secret> {
        let connection = &self.shared.connection;
        match &connection.credential {
            Credential::Token(token) => Some(token.clone()),
            Credential::X509 => None,
            Credential::Key(key) => {
                let expiry = now().seconds() + TOKEN_LIFETIME;
                Some(match &connection.owner {
                    Owner::Policy(policy) => sas::sign(&connection.host, key, expiry, Some(policy)),
                    Owner::Device(identity) => {
                        sas::sign(&sas::device_resource(&connection.host, identity), key, expiry, None)
                    }
                })
            }
        }
    }

    /// True if the credential can be renewed; a ready-made token cannot.
    pub fn renews(&self) -> bool {
        !matches!(self.shared.connection.credential, Credential::Token(_))
    }

    /// Sends a request with our token.
    pub async fn request(
        &self,
        method: Method,
        path: &str,
        headers: Vec<(HeaderName, HeaderValue)>,
        body: Bytes,
        timeout: Duration,
    ) -> Result<HttpResponse, HttpError> {
        self.request_noting(method, path, headers, body, timeout, || {}).await
    }

    /// The same, and calls `reached` once the hub has been reached.
    pub async fn request_noting(
        &self,
        method: Method,
        path: &str,
        headers: Vec<(HeaderName, HeaderValue)>,
        body: Bytes,
        timeout: Duration,
        reached: impl FnOnce() + Send,
    ) -> Result<HttpResponse, HttpError> {
        let connection = &self.shared.connection;
        let url = Url { host: connection.dial_host().to_owned(), port: connection.port, path: path.to_owned() };
        let mut headers = headers;
        // Both are made of printable ASCII only; a token in a file may not be, and then the hub says 401.
        if let Some(token) = self.token().as_ref().and_then(Secret::expose_str)
            && let Ok(mut value) = HeaderValue::from_str(token)
        {
            value.set_sensitive(true);
            headers.push((header::AUTHORIZATION, value));
        }
        if let Ok(value) = HeaderValue::from_str(&self.shared.user_agent) {
            headers.push((header::USER_AGENT, value));
        }
        request_noting(&self.shared.dialer, HttpRequest { method, url, headers, body, timeout }, reached).await
    }

    /// Opens our leg of a bridge.
    pub async fn carrier(
        &self,
        url: &str,
        ticket: &Secret,
        options: CarrierOptions,
    ) -> Result<HubCarrier, CarrierFailure> {
        let url: Url = url.parse()?;
        let io = self.shared.dialer.connect(&url.host, url.port, None).await?;
        if options.may_pause() {
            io.get_ref().0.get_ref().tolerate_pauses();
        }
        let upgrade = Upgrade {
            host: &url.host_header(),
            path: &url.path,
            subprotocol: None,
            bearer: Some(ticket),
            user_agent: &self.shared.user_agent,
        };
        upgraded(io, &upgrade, options).await
    }

    /// Opens a control session's carrier.
    pub async fn control_carrier(&self, path: &str) -> Result<HubCarrier, CarrierFailure> {
        let connection = &self.shared.connection;
        let io = self.shared.dialer.connect(connection.dial_host(), connection.port, None).await?;
        let upgrade = Upgrade {
            host: &self.name(),
            path,
            subprotocol: Some("mqtt"),
            bearer: None,
            user_agent: &self.shared.user_agent,
        };
        upgraded(io, &upgrade, CarrierOptions::CONTROL).await
    }
}

async fn upgraded(
    io: ClientStream<CarrierSocket>,
    upgrade: &Upgrade<'_>,
    options: CarrierOptions,
) -> Result<HubCarrier, CarrierFailure> {
    let address = io.get_ref().0.get_ref().get_ref().local_addr();
    let carrier = Carrier::client(io, upgrade, options).await?;
    if let Ok(address) = address {
        carrier.comes_from(address);
    }
    Ok(carrier)
}

/// What to add to the message when the hub does not accept our credential: the usual cause is a clock.
pub fn skew_hint(response: &HttpResponse) -> String {
    let Some(theirs) = response.header("date").and_then(parse_http_date) else { return String::new() };
    let ours = now().seconds();
    match ours.abs_diff(theirs) {
        skew if skew < NOTABLE_SKEW => String::new(),
        skew => {
            let direction = if ours > theirs { "ahead of" } else { "behind" };
            format!(" This machine's clock is {skew} s {direction} the hub's: set the clock.")
        }
    }
}

/// The time now, for tokens.
pub fn now() -> Utc {
    SystemTime::now().into()
}

/// True for an answer that says that our credential is not accepted.
pub fn is_unauthorized(response: &HttpResponse) -> bool {
    response.status == StatusCode::UNAUTHORIZED
}

/// `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110, section 5.6.7) as Unix seconds.
fn parse_http_date(text: &str) -> Option<u64> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let mut words = text.split_once(", ")?.1.split(' ');
    let day: u64 = words.next()?.parse().ok()?;
    let month = words.next()?;
    let month = MONTHS.iter().position(|name| *name == month)? as u64 + 1;
    let year: u64 = words.next()?.parse().ok().filter(|year| (1970..10_000).contains(year))?;
    let mut clock = words.next()?.split(':').map(str::parse::<u64>);
    let (hour, minute, second) = (clock.next()?.ok()?, clock.next()?.ok()?, clock.next()?.ok()?);
    // Days from the civil calendar, by the algorithm that `base::Utc` inverts.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day;
    Some(days.checked_sub(719_469)? * 86_400 + hour * 3600 + minute * 60 + second)
}

fn via(settings: &ProxySettings) -> Proxy {
    let password = settings.password.clone().unwrap_or_else(|| Secret::new(""));
    let credentials = settings.user.clone().map(|user| (user, password));
    Proxy { host: settings.host.clone(), port: settings.port, credentials }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http_dates_invert_the_calendar() {
        assert_eq!(parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        assert_eq!(parse_http_date("Thu, 29 Feb 2024 00:00:00 GMT"), Some(1_709_164_800));
        assert_eq!(parse_http_date("Thu, 01 Jan 1970 00:00:01 GMT"), Some(1));
        for bad in ["", "Sun, 06 Nov", "Sun, 06 Foo 1994 08:49:37 GMT", "x, 1 Jan 99999999999 00:00:00 GMT"] {
            assert_eq!(parse_http_date(bad), None, "{bad}");
        }
    }
}
