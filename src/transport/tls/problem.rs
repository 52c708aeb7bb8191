//! Words for a failed TLS handshake.
//!
//! Owns the texts a person reads when a certificate is refused: which certificate, why, and what to do. Does not
//! decide anything. Invariant: every text names the certificate it speaks of and one thing to try.

use std::{fmt, io, sync::Arc};

use rustls::{AlertDescription, CertificateError, OtherError, client::verify_server_name, server::ParsedCertificate};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use x509_parser::{prelude::FromDer, time::ASN1Time};

/// A certificate is renewed long before this much of its validity is left (ACME clients do at a third), if it is at all.
const LATE: i64 = 6;
/// With long-lived certificates, two weeks are time enough for a person.
const EARLIEST_WARNING: i64 = 14 * DAY;
const DAY: i64 = 86_400;
/// Names from a certificate are cut here: enough for any real name, too short to fill a log.
const MAX_NAME: usize = 200;

/// Why a TLS handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The server's certificate was refused.
    #[error("{0}")]
    Certificate(Arc<CertificateProblem>),
    /// The host is neither a DNS name nor an IP address.
    #[error("{0:?} is neither a DNS name nor an IP address")]
    Name(String),
    /// The other end refused us with an alert.
    #[error("the server ended the TLS handshake: {}", alert_text(*.0))]
    Alert(AlertDescription),
    /// The other end does not speak TLS, or not one we speak.
    #[error("the other end does not speak TLS, or none that we do: {0}; is it an HTTPS port?")]
    Protocol(rustls::Error),
    /// The connection ended in the middle of the handshake.
    #[error("the connection ended during the TLS handshake")]
    Io(#[source] io::Error),
}

impl HandshakeError {
    /// Sorts what tokio-rustls says.
    pub(super) fn from_io(error: io::Error) -> Self {
        let Some(inner) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) else {
            return Self::Io(error);
        };
        if let Some(problem) = CertificateProblem::from_rustls(inner) {
            return Self::Certificate(problem);
        }
        match inner {
            rustls::Error::AlertReceived(alert) => Self::Alert(*alert),
            other => Self::Protocol(other.clone()),
        }
    }

    /// True if the path failed, false if the other end or its certificate is wrong: trying again at once may help.
    pub fn is_path_failure(&self) -> bool {
        matches!(self, Self::Io(_))
    }
}

fn alert_text(alert: AlertDescription) -> String {
    match alert {
        AlertDescription::HandshakeFailure | AlertDescription::ProtocolVersion => {
            format!("{alert:?} (it speaks no version or cipher that we do; TLS 1.2 or newer is needed)")
        }
        AlertDescription::UnrecognisedName => format!("{alert:?} (it does not serve this host name)"),
        AlertDescription::CertificateRequired
        | AlertDescription::BadCertificate
        | AlertDescription::UnknownCA
        | AlertDescription::CertificateExpired
        | AlertDescription::CertificateUnknown => format!("{alert:?} (it refused our client certificate)"),
        other => format!("{other:?}"),
    }
}

/// Why a server's certificate was refused, with what it said about itself.
#[derive(Debug)]
pub struct CertificateProblem {
    reason: CertificateError,
    host: String,
    subject: String,
    issuer: String,
    names: Vec<String>,
    valid: Option<(i64, i64)>,
    self_signed: bool,
    trusted: String,
    now: i64,
}

impl std::error::Error for CertificateProblem {}

impl CertificateProblem {
    pub(super) fn new(
        reason: CertificateError,
        leaf: &CertificateDer<'_>,
        host: &ServerName<'_>,
        trusted: &str,
        now: UnixTime,
    ) -> Self {
        let parsed = x509_parser::certificate::X509Certificate::from_der(leaf).ok().map(|(_, parsed)| parsed);
        let name = |name: Option<&x509_parser::x509::X509Name<'_>>| {
            name.map_or_else(|| "(unreadable)".to_owned(), |name| printable(&name.to_string()))
        };
        let names = parsed
            .as_ref()
            .and_then(|parsed| parsed.subject_alternative_name().ok().flatten())
            .map(|names| names.value.general_names.iter().filter_map(alternative_name).take(8).collect::<Vec<_>>());
        Self {
            reason,
            host: host.to_str().into_owned(),
            subject: name(parsed.as_ref().map(|parsed| parsed.subject())),
            issuer: name(parsed.as_ref().map(|parsed| parsed.issuer())),
            names: names.unwrap_or_default(),
            valid: parsed
                .as_ref()
                .map(|parsed| (parsed.validity().not_before.timestamp(), parsed.validity().not_after.timestamp())),
            self_signed: parsed.as_ref().is_some_and(|parsed| parsed.subject() == parsed.issuer()),
            trusted: trusted.to_owned(),
            now: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
        }
    }

    /// What clients at `host` that trust the issuer will find wrong with a server's own certificate.
    pub(super) fn of_own(leaf: &CertificateDer<'_>, host: &ServerName<'_>, now: UnixTime) -> Option<Self> {
        let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(leaf).ok()?;
        let seconds = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let name = ParsedCertificate::try_from(leaf).and_then(|parsed| verify_server_name(&parsed, host));
        let reason = if seconds > parsed.validity().not_after.timestamp() {
            CertificateError::Expired
        } else if seconds < parsed.validity().not_before.timestamp() {
            CertificateError::NotValidYet
        } else if name.is_err() {
            CertificateError::NotValidForName
        } else {
            return None;
        };
        Some(Self::new(reason, leaf, host, "", now))
    }

    /// A warning ahead of the end of a server's own certificate.
    pub(super) fn ahead_of_expiry(leaf: &CertificateDer<'_>, host: &ServerName<'_>, now: UnixTime) -> Option<String> {
        let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(leaf).ok()?;
        let (from, to) = (parsed.validity().not_before.timestamp(), parsed.validity().not_after.timestamp());
        let left = to.saturating_sub(i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
        if left > (to.saturating_sub(from) / LATE).min(EARLIEST_WARNING) {
            return None;
        }
        let (host, subject, date) = (host.to_str(), printable(&parsed.subject().to_string()), date(Some(to)));
        let days = left / DAY;
        Some(format!("the certificate of {host} ({subject}) expires on {date}, in {days} days: renew it"))
    }

    /// True if the certificate is valid at another time than this machine's: its clock may be wrong.
    pub fn is_about_time(&self) -> bool {
        matches!(
            self.reason,
            CertificateError::Expired
                | CertificateError::ExpiredContext { .. }
                | CertificateError::NotValidYet
                | CertificateError::NotValidYetContext { .. }
        )
    }

    /// The same as an error that rustls carries through the handshake.
    pub(super) fn into_rustls(self) -> rustls::Error {
        rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(Carried(Arc::new(self))))))
    }

    fn from_rustls(error: &rustls::Error) -> Option<Arc<Self>> {
        let rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(other))) = error else { return None };
        other.downcast_ref::<Carried>().map(|carried| carried.0.clone())
    }
}

/// The problem on its way through rustls.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Carried(Arc<CertificateProblem>);

impl fmt::Display for CertificateProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, subject, issuer, trusted, .. } = self;
        match &self.reason {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => write!(
                f,
                "the certificate of {host} ({subject}) expired on {}; this machine's clock says {}: renew the \
                 certificate, or set the clock if it is wrong",
                date(self.valid.map(|(_, after)| after)),
                date(Some(self.now)),
            ),
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => write!(
                f,
                "the certificate of {host} ({subject}) is valid from {} on; this machine's clock says {}: set the \
                 clock (is NTP running?)",
                date(self.valid.map(|(before, _)| before)),
                date(Some(self.now)),
            ),
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => write!(
                f,
                "the certificate of the server is not for {host} but for {}: check the host name, or issue a \
                 certificate that names {host}",
                if self.names.is_empty() { "no host at all (no subjectAltName)".into() } else { self.names.join(", ") },
            ),
            CertificateError::UnknownIssuer if self.self_signed => write!(
                f,
                "the certificate of {host} ({subject}) is self-signed and not among {trusted}: point ca_file at it",
            ),
            CertificateError::UnknownIssuer => write!(
                f,
                "the certificate of {host} ({subject}) was issued by {issuer}, which is not among {trusted}: set \
                 ca_file to the issuer's CA certificate, or let the server send its intermediate certificates (a TLS-\
                 inspecting proxy on the way looks like this too)",
            ),
            CertificateError::BadSignature => write!(
                f,
                "the certificate of {host} ({subject}, issued by {issuer}) was not signed by the CA of that name \
                 among {trusted}: is ca_file from an earlier set-up?",
            ),
            other => write!(f, "the certificate of {host} ({subject}, issued by {issuer}) is not acceptable: {other}"),
        }
    }
}

/// When a certificate ends, in seconds since 1970.
pub(super) fn not_after(certificate: &CertificateDer<'_>) -> Option<i64> {
    let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(certificate).ok()?;
    Some(parsed.validity().not_after.timestamp())
}

fn alternative_name(name: &x509_parser::extensions::GeneralName<'_>) -> Option<String> {
    use x509_parser::extensions::GeneralName;
    match name {
        GeneralName::DNSName(name) => Some(printable(name)),
        GeneralName::IPAddress(octets) => match octets.len() {
            4 => <[u8; 4]>::try_from(*octets).ok().map(|octets| std::net::Ipv4Addr::from(octets).to_string()),
            16 => <[u8; 16]>::try_from(*octets).ok().map(|octets| std::net::Ipv6Addr::from(octets).to_string()),
            _ => None,
        },
        _ => None,
    }
}

/// A name out of a certificate, safe for one line of a log.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(MAX_NAME).collect()
}

fn date(seconds: Option<i64>) -> String {
    seconds
        .and_then(|seconds| ASN1Time::from_timestamp(seconds).ok())
        .map_or_else(|| "an unreadable date".into(), |time| time.to_string())
}
