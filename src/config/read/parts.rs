//! The sections that several files have in common.
//!
//! Owns the keys of `[log]`, `[metrics]`, the proxy and the certificates. Does not know the roles.
//! Invariant: no reason quotes a password, a key or a token.

use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};

use crate::{
    auth::ConnectionString,
    config::{
        parts::{
            Certificate, FileContents, LinkLimits, LogConfig, LogFormat, MetricsConfig, Proxy, ProxyRule, host_is_valid,
        },
        section::Section,
        value::SocketAddress,
    },
};

/// Smallest mux and replay memory: one yamux window, below which a channel cannot move.
const MIN_WINDOW: u64 = 256 << 10;
/// Most channels: what a test of the mux covers.
const MAX_CHANNELS: u32 = 65_536;

/// `connection_string_file`.
pub(super) fn connection_string(section: &Section<'_>) -> Option<ConnectionString> {
    const KEY: &str = "connection_string_file";
    let file = section.required_secret(KEY)?;
    let text = file.secret.expose_str().unwrap_or_default();
    text.parse().map_err(|error| section.problem(KEY, format!("{}: {error}", file.path.display()))).ok()
}

/// A PEM file of certificates.
pub(super) fn certificates(section: &Section<'_>, key: &'static str) -> Option<FileContents> {
    let file = section.file(key)?;
    let path = file.path.display();
    match CertificateDer::pem_slice_iter(&file.contents).collect::<Result<Vec<_>, _>>() {
        Ok(found) if found.is_empty() => section.problem(key, format!("{path} holds no certificate in PEM form")),
        Ok(_) => return Some(file),
        Err(error) => section.problem(key, format!("{path} is not PEM: {error}")),
    }
    None
}

/// A certificate chain and its key, which belong together.
pub(super) fn certificate(section: &Section<'_>) -> Option<Certificate> {
    const KEY: &str = "private_key_file";
    let certificate = certificates(section, "certificate_file");
    let private_key = section.secret(KEY)?;
    let path = private_key.path.display();
    let Ok(key) = PrivateKeyDer::from_pem_slice(private_key.secret.expose()) else {
        section.problem(KEY, format!("{path} holds no unencrypted private key in PEM form"));
        return None;
    };
    let certificate = certificate?;
    let chain = CertificateDer::pem_slice_iter(&certificate.contents).flatten().collect();
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    match rustls::sign::CertifiedKey::from_der(chain, key, &provider) {
        Ok(_) => return Some(Certificate { certificate, private_key }),
        Err(rustls::Error::InconsistentKeys(_)) => {
            section.problem(KEY, format!("{path} is not the key of {}", certificate.path.display()));
        }
        Err(error) => section.problem(KEY, format!("{path} cannot be used: {error}")),
    }
    None
}

/// `proxy` and `proxy_password_file`.
pub(super) fn proxy(section: &Section<'_>) -> ProxyRule {
    let password = section.secret("proxy_password_file");
    let Some(text) = section.optional::<String>("proxy") else {
        if section.has("proxy_password_file") {
            section.problem("proxy_password_file", "has no proxy to belong to; set proxy = \"http://user@host:port\"");
        }
        return ProxyRule::Environment;
    };
    if text == "off" {
        return ProxyRule::Off;
    }
    match parse_proxy(&text) {
        Ok(proxy) if password.is_some() && proxy.user.is_none() => {
            section.problem("proxy", "names no user for the password; write http://user@host:port");
            ProxyRule::Environment
        }
        Ok(proxy) => ProxyRule::Via(Proxy { password: password.map(|file| file.secret), ..proxy }),
        Err(reason) => {
            section.problem("proxy", reason);
            ProxyRule::Environment
        }
    }
}

/// `http://user@host:port`; the port defaults to 3128 nowhere: proxies differ.
fn parse_proxy(text: &str) -> Result<Proxy, &'static str> {
    const SPELLING: &str = "is not a proxy; write it like \"http://proxy.example:3128\", or \"off\"";
    let rest = text.strip_prefix("http://").ok_or(SPELLING)?;
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let (user, address) = match rest.rsplit_once('@') {
        Some((user, _)) if user.contains(':') => return Err("holds a password; put it into proxy_password_file"),
        Some((user, address)) => (Some(user.to_owned()), address),
        None => (None, rest),
    };
    let (host, port) = address.rsplit_once(':').ok_or(SPELLING)?;
    let port = port.parse().map_err(|_| SPELLING)?;
    if port == 0 || !host_is_valid(host) || user.as_deref() == Some("") {
        return Err(SPELLING);
    }
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    Ok(Proxy { host, port, user, password: None })
}

/// `[metrics]`, over the role's default.
pub(super) fn metrics(root: &Section<'_>, default: MetricsConfig) -> MetricsConfig {
    let section = root.section("metrics");
    let mut metrics = default;
    match section.optional::<String>("listen").as_deref() {
        Some("off") => metrics.listen = None,
        Some(text) => match text.parse::<SocketAddress>() {
            Ok(address) => metrics.listen = Some(address.0),
            Err(reason) => section.problem("listen", format!("{reason}, or \"off\"")),
        },
        None => {}
    }
    if metrics.listen.is_some_and(|address| !address.ip().is_loopback()) {
        section.warn("listen", "is reachable from the network, and metrics ask for no credential");
    }
    section.set("allowed_hosts", &mut metrics.allowed_hosts);
    section.finish();
    metrics
}

/// `[log]`.
pub(super) fn log(root: &Section<'_>) -> LogConfig {
    let section = root.section("log");
    let mut log = LogConfig::default();
    section.set("format", &mut log.format);
    if let Some(level) = section.optional::<String>("level") {
        match level.split(',').find(|part| !directive_is_valid(part.trim())) {
            Some(part) => section.problem(
                "level",
                format!(
                    "{part:?} is not a level; write error, warn, info, debug, trace, or \"info,culvert::hub=debug\""
                ),
            ),
            None => log.level = level,
        }
    }
    section.finish();
    log
}

/// `debug` or `culvert::hub=debug`.
fn directive_is_valid(part: &str) -> bool {
    let (target, level) = part.split_once('=').unwrap_or(("culvert", part));
    let path = |c: char| c.is_ascii_alphanumeric() || "_:-".contains(c);
    ["off", "error", "warn", "info", "debug", "trace"].contains(&level)
        && !target.is_empty()
        && target.chars().all(path)
}

impl std::str::FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            "journald" => Ok(Self::Journald),
            other => Err(format!("{other:?} is not a format; write auto, text, json or journald")),
        }
    }
}

/// The keys of `[limits]` that device and service share.
pub(super) fn link_limits(section: &Section<'_>, limits: &mut LinkLimits) {
    match section.optional::<u32>("max_channels") {
        Some(channels) if !(1..=MAX_CHANNELS).contains(&channels) => {
            section.problem("max_channels", format!("must be between 1 and {MAX_CHANNELS}"));
        }
        Some(channels) => limits.max_channels = channels,
        None => {}
    }
    let memory = |key, value: &mut usize| {
        let mut size = *value as u64;
        section.set_size(key, MIN_WINDOW, &mut size);
        *value = usize::try_from(size).unwrap_or(usize::MAX);
    };
    memory("max_buffered", &mut limits.max_buffered);
    memory("max_replay", &mut limits.max_replay);
    memory("max_replay_total", &mut limits.max_replay_total);
    if limits.max_replay_total < limits.max_replay {
        section.problem("max_replay_total", "is smaller than max_replay, which no link could then reach");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_has_a_host_and_a_port_and_no_password() {
        let proxy = parse_proxy("http://user@proxy.example:3128/").unwrap();
        assert_eq!((proxy.host.as_str(), proxy.port, proxy.user.as_deref()), ("proxy.example", 3128, Some("user")));
        assert_eq!(parse_proxy("http://[::1]:8080").unwrap().host, "::1");
        for bad in ["proxy:3128", "https://proxy:3128", "http://proxy", "http://p:0", "http://@p:1", "http://p:1/x"] {
            assert!(parse_proxy(bad).is_err(), "{bad}");
        }
        assert!(!parse_proxy("http://u:canary@p:1").unwrap_err().contains("canary"));
    }

    #[test]
    fn log_levels_are_words_or_exceptions() {
        for good in ["info", "off", "culvert::hub=trace", "hyper=warn"] {
            assert!(directive_is_valid(good), "{good}");
        }
        for bad in ["", "inf", "INFO!", "=debug", "culvert::hub=", "a b=info"] {
            assert!(!directive_is_valid(bad), "{bad}");
        }
    }
}
