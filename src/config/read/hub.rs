//! `hub.toml`.
//!
//! Owns its keys. Does not know defaults. Invariant: a hub without a usable policy is refused, so that a hub is
//! never open by oversight.

use std::net::SocketAddr;

use super::{parts, refuse_duplicates};
use crate::{
    auth::{Rights, key::decode_key},
    base::{DeviceId, IdError, Secret},
    config::{
        hub::{DevicePattern, HubConfig, HubLimits, PolicyRule, PublicUrl, ResourceLogConfig},
        parts::host_is_valid,
        section::{Location, Section},
        value::SocketAddress,
    },
};

/// Smallest size at which the resource log rotates: a handful of records.
const MIN_RESOURCE_LOG: u64 = 4 << 10;

/// Reads the whole file.
pub(crate) fn hub(root: Section<'_>) -> Option<HubConfig> {
    let environment = root.sources.environment();
    let hostname = hostname(&root);
    let tls_section = root.section("tls");
    for key in ["certificate_file", "private_key_file"] {
        if !tls_section.has(key) {
            tls_section.problem(key, "is missing");
        }
    }
    let tls = parts::certificate(&tls_section);
    tls_section.finish();
    let state_dir = root.optional("state_dir").unwrap_or_else(|| environment.state_dir("hub"));
    let control_socket = root.optional("control_socket").unwrap_or_else(|| environment.control_socket("hub"));
    let (listen, mqtt_listen) = (addresses(&root, "listen"), addresses(&root, "mqtt_listen"));
    if listen.as_ref().is_some_and(Vec::is_empty) {
        root.problem("listen", "is empty: the hub would be unreachable");
    }
    let public_url = root.optional("public_url");
    let client_ca = parts::certificates(&root, "client_ca_file");
    let allowed_origins = root.optional("allowed_origins").unwrap_or_default();
    let policies = policies(&root);
    let limits = limits(&root);
    let log = parts::log(&root);
    let metrics = parts::metrics(&root, HubConfig::default_metrics());
    let resource_log = resource_log(&root, ResourceLogConfig::in_folder(&state_dir));
    let base = hostname.zip(tls).map(|(hostname, tls)| HubConfig::new(hostname, tls, state_dir));
    let config = base.map(|base| HubConfig {
        listen: listen.unwrap_or_else(|| base.listen.clone()),
        mqtt_listen: mqtt_listen.unwrap_or_else(|| base.mqtt_listen.clone()),
        public_url,
        control_socket: Some(control_socket),
        client_ca,
        allowed_origins,
        policies,
        limits,
        metrics,
        log,
        resource_log,
        ..base
    });
    config.iter().for_each(|config| check_listeners(&root, config));
    root.finish();
    config
}

fn hostname(root: &Section<'_>) -> Option<String> {
    let name: String = root.required("hostname")?;
    if !host_is_valid(&name) {
        root.problem("hostname", format!("{name:?} is not a host name; leave out scheme and port"));
        return None;
    }
    if !name.contains('.') {
        root.warn("hostname", "has no dot: device programs built on the C SDK refuse such a name");
    }
    Some(name)
}

fn addresses(root: &Section<'_>, key: &'static str) -> Option<Vec<SocketAddr>> {
    Some(root.optional::<Vec<SocketAddress>>(key)?.into_iter().map(|address| address.0).collect())
}

fn check_listeners(root: &Section<'_>, config: &HubConfig) {
    let all = [("listen", &config.listen), ("mqtt_listen", &config.mqtt_listen)];
    let mut seen: Vec<SocketAddr> = config.metrics.listen.into_iter().collect();
    for (key, address) in all.into_iter().flat_map(|(key, list)| list.iter().map(move |address| (key, *address))) {
        if address.port() != 0 && seen.contains(&address) {
            root.problem(key, format!("{address} is used twice"));
        }
        seen.push(address);
    }
}

fn policies(root: &Section<'_>) -> Vec<PolicyRule> {
    let sections = root.sections("policy");
    if sections.is_empty() {
        root.problem("policy", "there is no [[policy]]: nobody could open a device stream or register a device");
    }
    let rules: Vec<(PolicyRule, Location)> = sections.into_iter().filter_map(policy).collect();
    refuse_duplicates(root.sources, "policy.name", rules.iter().map(|(rule, at)| (&rule.name, at)));
    rules.into_iter().map(|(rule, _)| rule).collect()
}

fn policy(section: Section<'_>) -> Option<(PolicyRule, Location)> {
    let name = section.required("name");
    let rights = section.required::<Vec<Rights>>("rights").map(|rights| Rights::union(&rights));
    if rights == Some(Rights::NONE) {
        section.problem("rights", "is empty: the policy would permit nothing");
    }
    if !section.has("primary_key_file") {
        section.problem("primary_key_file", "is missing");
    }
    let primary_key = key(&section, "primary_key_file");
    let secondary_key = key(&section, "secondary_key_file");
    let devices: Option<Vec<DevicePattern>> = section.optional("devices");
    if devices.as_ref().is_some_and(Vec::is_empty) {
        section.problem("devices", "is empty: the policy would reach no device; leave the key out to reach all");
    }
    let at = section.location("name");
    section.finish();
    let devices = devices.unwrap_or_default();
    Some((PolicyRule { name: name?, rights: rights?, primary_key: primary_key?, secondary_key, devices }, at))
}

/// A base64 key in a file.
fn key(section: &Section<'_>, key: &'static str) -> Option<Secret> {
    let file = section.secret(key)?;
    let text = file.secret.expose_str().unwrap_or_default();
    decode_key(text).map_err(|error| section.problem(key, format!("{}: {error}", file.path.display()))).ok()
}

fn limits(root: &Section<'_>) -> HubLimits {
    let section = root.section("limits");
    let mut limits = HubLimits::default();
    section.set_count("max_unauthenticated", &mut limits.max_unauthenticated);
    section.set_count("max_unauthenticated_per_address", &mut limits.max_unauthenticated_per_address);
    section.set_count("max_sessions", &mut limits.max_sessions);
    section.set_count("max_bridges", &mut limits.max_bridges);
    section.set_count("max_bridges_per_device", &mut limits.max_bridges_per_device);
    section.set_count("max_pending_per_device", &mut limits.max_pending_per_device);
    section.set_timeout("tls_handshake_timeout", &mut limits.tls_handshake_timeout);
    section.set_timeout("request_head_timeout", &mut limits.request_head_timeout);
    section.set_timeout("request_body_timeout", &mut limits.request_body_timeout);
    section.set_timeout("write_stall_timeout", &mut limits.write_stall_timeout);
    section.set_timeout("stream_handshake_timeout", &mut limits.stream_handshake_timeout);
    section.set("drain_timeout", &mut limits.drain_timeout);
    limits.max_token_lifetime = section.optional("max_token_lifetime");
    section.finish();
    limits
}

fn resource_log(root: &Section<'_>, default: ResourceLogConfig) -> ResourceLogConfig {
    let section = root.section("resource_log");
    let mut log = default;
    section.set("file", &mut log.file);
    section.set_size("max_size", MIN_RESOURCE_LOG, &mut log.max_size);
    section.set("keep", &mut log.keep);
    if log.keep > ResourceLogConfig::MAX_KEEP {
        section.problem("keep", format!("must be at most {}", ResourceLogConfig::MAX_KEEP));
    }
    section.set("stdout", &mut log.stdout);
    section.finish();
    log
}

impl std::str::FromStr for PublicUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let error = || format!("{text:?} is not a URL of a hub; write it like \"https://hub.example.com:443\"");
        let rest = text.strip_prefix("https://").ok_or_else(error)?;
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let ends_in_bracket = rest.ends_with(']');
        let (host, port) = rest.rsplit_once(':').filter(|_| !ends_in_bracket).unwrap_or((rest, "443"));
        let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(error)?;
        if !host_is_valid(host) {
            return Err(error());
        }
        Ok(Self { host: host.trim_start_matches('[').trim_end_matches(']').into(), port })
    }
}

impl std::str::FromStr for DevicePattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let invalid = |error: IdError| error.to_string();
        match text.strip_suffix('*') {
            Some(prefix) => {
                // What an ID could begin with: it is one with a letter behind it.
                format!("{prefix}x").parse::<DeviceId>().map_err(invalid)?;
                Ok(Self::Prefix(prefix.into()))
            }
            None => Ok(Self::Exact(text.parse().map_err(invalid)?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_urls_are_https_with_an_optional_port() {
        for (text, printed) in [
            ("https://hub.example.com", "https://hub.example.com:443"),
            ("https://hub:8443/", "https://hub:8443"),
            ("https://[::1]", "https://[::1]:443"),
            ("https://[::1]:8443", "https://[::1]:8443"),
        ] {
            assert_eq!(text.parse::<PublicUrl>().unwrap().to_string(), printed);
        }
        for bad in ["http://hub", "hub", "https://", "https://hub/path", "https://hub:0", "https://a b", "wss://hub"] {
            assert!(bad.parse::<PublicUrl>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_star_at_the_end_is_a_prefix() {
        assert_eq!("kiosk-*".parse(), Ok(DevicePattern::Prefix("kiosk-".into())));
        assert_eq!("*".parse(), Ok(DevicePattern::Prefix(String::new())));
        assert_eq!("pump-17".parse(), Ok(DevicePattern::Exact("pump-17".parse().unwrap())));
        assert!("a/b*".parse::<DevicePattern>().is_err());
    }
}
