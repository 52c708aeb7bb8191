//! Connection strings: where the hub is, who one is, and how one proves it (wire.md, section e).
//!
//! Owns the `Key=Value;...` syntax. Does not know files. Invariant: a value of [`ConnectionString`] names exactly
//! one owner and one kind of credential, and printing it shows no secret.

use std::{fmt, net::Ipv6Addr, str::FromStr};

use super::key::{KeyError, decode_key, encode_key};
use crate::base::{IdError, Identity, Name, Secret};

/// Longest connection string in bytes; a device ID, a module ID and a SAS token fit.
const MAX_CONNECTION_STRING: usize = 8192;

/// Why a text is not a connection string. Never quotes a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectionStringError {
    /// Longer than any connection string can be.
    #[error("the connection string is longer than {MAX_CONNECTION_STRING} bytes")]
    TooLong,
    /// A part without `=`.
    #[error("part {0} of the connection string is not \"Key=Value\"; parts are separated by \";\"")]
    NotAPair(usize),
    /// A key that no connection string has.
    #[error("the connection string has an unknown part {0:?}")]
    UnknownPart(String),
    /// A key that stands there twice.
    #[error("the connection string has the part {0} twice")]
    Twice(&'static str),
    /// Something needed is missing.
    #[error("the connection string has no {0}")]
    Missing(&'static str),
    /// A host name that is empty or holds characters a host name cannot have.
    #[error("HostName in the connection string is not a host name")]
    Host,
    /// Parts that exclude each other.
    #[error("the connection string has both {0} and {1}")]
    Conflict(&'static str, &'static str),
    /// A bad identifier.
    #[error("in the connection string: {0}")]
    Id(#[from] IdError),
    /// A bad key.
    #[error("SharedAccessKey in the connection string: {0}")]
    Key(#[from] KeyError),
}

/// Whose connection string it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// A device's or module's.
    Device(Identity),
    /// A shared access policy's.
    Policy(Name),
}

/// How the owner proves itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credential {
    /// A key that signs tokens.
    Key(Secret),
    /// A ready-made token that cannot be renewed.
    Token(Secret),
    /// A client certificate, configured elsewhere.
    X509,
}

/// A parsed connection string.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionString {
    /// The hub's name: in SAS resources, in the MQTT user name and, without a gateway, the host to dial. A port
    /// that follows it (`host:8443`, an extension of ours for hubs not on 443) is split off into `port`.
    pub host: String,
    /// The port of the hub's HTTPS listener; 443 if the text names none.
    pub port: u16,
    /// The host to dial instead of `host`, if given.
    pub gateway: Option<String>,
    /// Whose it is.
    pub owner: Owner,
    /// The proof.
    pub credential: Credential,
}

/// The HTTPS port when a connection string names none: the SDKs' fixed port.
pub const DEFAULT_PORT: u16 = 443;

impl ConnectionString {
    /// The host name to dial and to check the certificate against.
    pub fn dial_host(&self) -> &str {
        self.gateway.as_deref().unwrap_or(&self.host)
    }

    /// The text with its secret, for the one moment at which it is handed to its owner.
    pub fn expose(&self) -> Secret {
        let mut text = self.public_parts();
        match &self.credential {
            Credential::Key(key) => text.push_str(&format!(";SharedAccessKey={}", encode_key(key))),
            Credential::Token(token) => {
                text.push_str(&format!(";SharedAccessSignature={}", token.expose_str().unwrap_or_default()));
            }
            Credential::X509 => text.push_str(";x509=true"),
        }
        if let Some(gateway) = &self.gateway {
            text.push_str(&format!(";GatewayHostName={}", bracketed(gateway)));
        }
        Secret::new(text)
    }

    fn public_parts(&self) -> String {
        let port = if self.port == DEFAULT_PORT { String::new() } else { format!(":{}", self.port) };
        let host = format!("HostName={}{port}", bracketed(&self.host));
        match &self.owner {
            Owner::Policy(policy) => format!("{host};SharedAccessKeyName={policy}"),
            Owner::Device(Identity { device, module: None }) => format!("{host};DeviceId={device}"),
            Owner::Device(Identity { device, module: Some(module) }) => {
                format!("{host};DeviceId={device};ModuleId={module}")
            }
        }
    }
}

impl fmt::Display for ConnectionString {
    /// Everything but the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.public_parts())
    }
}

impl FromStr for ConnectionString {
    type Err = ConnectionStringError;

    fn from_str(text: &str) -> Result<Self, ConnectionStringError> {
        if text.len() > MAX_CONNECTION_STRING {
            return Err(ConnectionStringError::TooLong);
        }
        let parts = Parts::split(text.trim())?;
        let (host, port) = split_host(parts.host.ok_or(ConnectionStringError::Missing("HostName"))?)?;
        let gateway = parts.gateway.map(|gateway| split_host(gateway).map(|(host, _)| host)).transpose()?;
        Ok(Self { host, port, gateway, owner: parts.owner()?, credential: parts.credential()? })
    }
}

#[derive(Default)]
struct Parts<'a> {
    host: Option<&'a str>,
    gateway: Option<&'a str>,
    device: Option<&'a str>,
    module: Option<&'a str>,
    policy: Option<&'a str>,
    key: Option<&'a str>,
    token: Option<&'a str>,
    x509: Option<&'a str>,
}

impl<'a> Parts<'a> {
    fn split(text: &'a str) -> Result<Self, ConnectionStringError> {
        let mut parts = Self::default();
        for (index, pair) in text.split(';').enumerate().filter(|(_, pair)| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').ok_or(ConnectionStringError::NotAPair(index + 1))?;
            let (slot, name) = match name.trim() {
                "HostName" => (&mut parts.host, "HostName"),
                "GatewayHostName" => (&mut parts.gateway, "GatewayHostName"),
                "DeviceId" => (&mut parts.device, "DeviceId"),
                "ModuleId" => (&mut parts.module, "ModuleId"),
                "SharedAccessKeyName" => (&mut parts.policy, "SharedAccessKeyName"),
                "SharedAccessKey" => (&mut parts.key, "SharedAccessKey"),
                "SharedAccessSignature" => (&mut parts.token, "SharedAccessSignature"),
                "x509" | "X509" => (&mut parts.x509, "x509"),
                other => {
                    let shown = other.chars().take(32).filter(|c| !c.is_control()).collect();
                    return Err(ConnectionStringError::UnknownPart(shown));
                }
            };
            if slot.replace(value.trim()).is_some() {
                return Err(ConnectionStringError::Twice(name));
            }
        }
        Ok(parts)
    }

    fn owner(&self) -> Result<Owner, ConnectionStringError> {
        match (self.device, self.module, self.policy) {
            (Some(_), _, Some(_)) => Err(ConnectionStringError::Conflict("DeviceId", "SharedAccessKeyName")),
            (Some(device), module, None) => {
                let module = module.map(str::parse).transpose()?;
                Ok(Owner::Device(Identity { device: device.parse()?, module }))
            }
            (None, None, Some(policy)) => Ok(Owner::Policy(policy.parse()?)),
            (None, ..) => Err(ConnectionStringError::Missing("DeviceId and no SharedAccessKeyName")),
        }
    }

    fn credential(&self) -> Result<Credential, ConnectionStringError> {
        let x509 = self.x509.is_some_and(|value| value.eq_ignore_ascii_case("true"));
        match (self.key, self.token, x509) {
            (Some(_), Some(_), _) => Err(ConnectionStringError::Conflict("SharedAccessKey", "SharedAccessSignature")),
            (Some(key), None, false) => Ok(Credential::Key(decode_key(key)?)),
            (None, Some(token), false) => Ok(Credential::Token(Secret::new(token))),
            (None, None, true) => Ok(Credential::X509),
            (None, None, false) => Err(ConnectionStringError::Missing("SharedAccessKey")),
            (_, _, true) => Err(ConnectionStringError::Conflict("x509=true", "a key")),
        }
    }
}

/// `host` or `host:port`; brackets around an IPv6 address stay out of the host.
fn split_host(text: &str) -> Result<(String, u16), ConnectionStringError> {
    let bad = || ConnectionStringError::Host;
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, after) = rest.split_once(']').ok_or_else(bad)?;
            if host.parse::<Ipv6Addr>().is_err() || !(after.is_empty() || after.starts_with(':')) {
                return Err(bad());
            }
            (host, after.strip_prefix(':'))
        }
        None => text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port))),
    };
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-._:".contains(c);
    if host.is_empty() || host.len() > 253 || !host.chars().all(allowed) {
        return Err(bad());
    }
    let port = port.map_or(Ok(DEFAULT_PORT), |port| port.parse().map_err(|_| bad()))?;
    Ok((host.to_owned(), port))
}

/// A host as [`split_host`] understands it again.
fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

/// Any bytes as a connection string: it is refused, or its text has the same meaning again. For fuzzers.
///
/// # Panics
/// If the text of a parsed connection string means something else.
pub fn fuzz_connection_string(data: &[u8]) {
    let Ok(parsed) = String::from_utf8_lossy(data).parse::<ConnectionString>() else { return };
    let text = parsed.expose();
    let again = text.expose_str().and_then(|text| text.parse().ok());
    assert_eq!(again.as_ref(), Some(&parsed), "what is shown is what was meant");
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "FxcXFxcXFxcXFxcXFxcXFxcXFxcXFxcXFxcXFxcXFxc=";

    #[test]
    fn the_sdks_strings_are_understood() {
        let device: ConnectionString =
            format!("HostName=hub.example.com;DeviceId=pump-17;SharedAccessKey={KEY}").parse().unwrap();
        assert_eq!(device.host, "hub.example.com");
        assert_eq!(device.owner, Owner::Device("pump-17".parse().unwrap()));
        let module: ConnectionString =
            format!("HostName=h;DeviceId=d;ModuleId=m;SharedAccessKey={KEY};GatewayHostName=edge").parse().unwrap();
        assert_eq!((module.dial_host(), &module.owner), ("edge", &Owner::Device("d/m".parse().unwrap())));
        let policy: ConnectionString =
            format!("HostName=h:8443;SharedAccessKeyName=service;SharedAccessKey={KEY}\n").parse().unwrap();
        assert_eq!((policy.port, &policy.owner), (8443, &Owner::Policy("service".parse().unwrap())));
        let address: ConnectionString = "HostName=[::1]:8443;DeviceId=d;x509=true".parse().unwrap();
        assert_eq!(
            (address.host.as_str(), address.port, address.to_string()),
            ("::1", 8443, "HostName=[::1]:8443;DeviceId=d".into())
        );
        for host in ["[h:]x", "[::1]x", "[::1", "::1", "[::1]:", "[]"] {
            let text = format!("HostName={host};DeviceId=d;x509=true");
            assert_eq!(text.parse::<ConnectionString>(), Err(ConnectionStringError::Host), "{host}");
        }
        let x509: ConnectionString = "HostName=h;DeviceId=d;x509=true".parse().unwrap();
        assert_eq!(x509.credential, Credential::X509);
    }

    #[test]
    fn printing_shows_everything_but_the_secret_and_exposing_it_round_trips() {
        for text in [
            format!("HostName=h;DeviceId=d;SharedAccessKey={KEY}"),
            format!("HostName=h:8443;SharedAccessKeyName=service;SharedAccessKey={KEY}"),
            "HostName=h;DeviceId=d;ModuleId=m;x509=true".into(),
        ] {
            let parsed: ConnectionString = text.parse().unwrap();
            assert_eq!(parsed.expose().expose_str().unwrap(), text);
            assert!(!format!("{parsed} {parsed:?}").contains("Fxc"));
        }
    }

    #[test]
    fn mistakes_are_named() {
        use ConnectionStringError as E;
        for (text, error) in [
            ("", E::Missing("HostName")),
            ("HostName", E::NotAPair(1)),
            ("HostName=h;DeviceId=d", E::Missing("SharedAccessKey")),
            ("HostName=h/x;DeviceId=d;x509=true", E::Host),
            ("HostName=h;HostName=g", E::Twice("HostName")),
            ("HostName=h;DeviceId=d;SharedAccessKeyName=p;x509=true", E::Conflict("DeviceId", "SharedAccessKeyName")),
            ("HostName=h;Colour=red", E::UnknownPart("Colour".into())),
            ("HostName=h;DeviceId=d;SharedAccessKey=QUJD", E::Key(KeyError::Length(3))),
        ] {
            assert_eq!(text.parse::<ConnectionString>().unwrap_err(), error, "{text}");
        }
    }
}
