//! `device.toml` and `targets.d/*.toml`.
//!
//! Owns their keys. Does not know defaults. Invariant: what a device exposes is written out in a target.

use std::net::IpAddr;

use super::{RESERVED, parts, refuse_duplicates, rules};
use crate::{
    auth::{ConnectionString, Credential, Owner},
    base::Name,
    config::{
        device::{DeviceConfig, DeviceLimits, TargetRule},
        parts::TargetAddress,
        section::{Location, Section},
    },
};

/// Reads the whole file and its folder.
pub(crate) fn device(root: Section<'_>) -> Option<DeviceConfig> {
    let environment = root.sources.environment();
    let connection_string = parts::connection_string(&root);
    let certificate = if root.has("certificate_file") || root.has("private_key_file") {
        require_pair(&root);
        parts::certificate(&root)
    } else {
        None
    };
    let ca = parts::certificates(&root, "ca_file");
    let proxy = parts::proxy(&root);
    let state_dir = root.optional("state_dir").unwrap_or_else(|| environment.state_dir("device"));
    let control_socket = root.optional("control_socket").unwrap_or_else(|| environment.control_socket("device"));
    let targets = targets(&root);
    let limits = limits(&root);
    let log = parts::log(&root);
    let resume_for = root.optional("resume_for");
    let metrics = parts::metrics(&root, DeviceConfig::default_metrics());
    connection_string.iter().for_each(|text| check_credential(&root, text));
    root.finish();
    let base = DeviceConfig::new(connection_string?, state_dir);
    Some(DeviceConfig {
        certificate,
        ca,
        proxy,
        control_socket: Some(control_socket),
        resume_for: resume_for.unwrap_or(base.resume_for),
        targets,
        limits,
        metrics,
        log,
        ..base
    })
}

fn require_pair(root: &Section<'_>) {
    for key in ["certificate_file", "private_key_file"] {
        if !root.has(key) {
            root.problem(key, "is missing: certificate and key come together");
        }
    }
}

fn check_credential(root: &Section<'_>, connection_string: &ConnectionString) {
    const KEY: &str = "connection_string_file";
    if matches!(connection_string.owner, Owner::Policy(_)) {
        root.problem(
            KEY,
            "holds a policy's connection string; a device has its own, from: culvert registry add DEVICE",
        );
    }
    let certificate = root.has("certificate_file");
    match connection_string.credential {
        Credential::X509 if !certificate => {
            root.problem("certificate_file", "is missing: the connection string says x509=true");
        }
        Credential::Key(_) | Credential::Token(_) if certificate => {
            root.problem("certificate_file", "is not used: the connection string does not say x509=true");
        }
        Credential::Token(_) => {
            root.warn(KEY, "holds a ready-made token, which cannot be renewed: the device is gone when it expires");
        }
        Credential::X509 | Credential::Key(_) => {}
    }
}

fn targets(root: &Section<'_>) -> Vec<TargetRule> {
    let rules = rules(root, "target", "targets.d", target);
    refuse_duplicates(root.sources, "target.name", rules.iter().map(|(rule, at)| (&rule.name, at)));
    rules.into_iter().map(|(rule, _)| rule).collect()
}

fn target(section: Section<'_>) -> Option<(TargetRule, Location)> {
    let name: Option<Name> = section.required("name");
    if name.as_ref().is_some_and(|name| name.as_str().starts_with(RESERVED)) {
        section.problem("name", format!("names that begin with {RESERVED} are culvert's own"));
    }
    let address = section.required("address");
    let policies: Option<Vec<Name>> = section.optional("policies");
    if policies.as_ref().is_some_and(Vec::is_empty) {
        section.problem("policies", "is empty: nobody could use the target; leave the key out to permit every policy");
    }
    let max_connections = section.count("max_connections");
    let plain_eof = section.optional("plain_eof").unwrap_or_default();
    let allow_link_local = section.optional("allow_link_local").unwrap_or_default();
    let connect_timeout = section.timeout("connect_timeout");
    address.iter().for_each(|address| check_address(&section, address, allow_link_local));
    let at = section.location("name");
    section.finish();
    let base = TargetRule::new(name?, address?);
    let rule = TargetRule {
        policies,
        max_connections: max_connections.unwrap_or(base.max_connections),
        plain_eof,
        allow_link_local,
        connect_timeout: connect_timeout.unwrap_or(base.connect_timeout),
        ..base
    };
    Some((rule, at))
}

fn check_address(section: &Section<'_>, address: &TargetAddress, allow_link_local: bool) {
    if address.port() == Some(0) {
        section.problem("address", "has port 0, which nothing listens on");
    }
    let literal = address.host().and_then(|host| host.split('%').next()?.parse::<IpAddr>().ok());
    // The kernel connects to an IPv4 address in IPv6's spelling, too.
    let link_local = literal.is_some_and(|ip| match ip.to_canonical() {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    });
    if link_local && !allow_link_local {
        section
            .problem("address", "is link-local, where clouds keep credentials; say allow_link_local = true if meant");
    }
}

fn limits(root: &Section<'_>) -> DeviceLimits {
    let section = root.section("limits");
    let link = root.sources.environment().link_limits();
    let mut limits = DeviceLimits { link, ..DeviceLimits::default() };
    section.set_count("max_services", &mut limits.max_services);
    section.set_count("max_plain", &mut limits.max_plain);
    section.set_count("max_connections", &mut limits.max_connections);
    parts::link_limits(&section, &mut limits.link);
    section.finish();
    limits
}
