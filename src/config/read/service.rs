//! `service.toml` and `forwards.d/*.toml`.
//!
//! Owns their keys. Does not know defaults. Invariant: no two forwards could take each other's address.

use std::net::IpAddr;

use super::{RESERVED, parts, refuse_duplicates, rules};
use crate::{
    auth::Owner,
    base::Name,
    config::{
        parts::ListenAddress,
        problem::Problem,
        section::{Location, Section},
        service::{ConnectMode, ForwardMode, ForwardRule, ServiceConfig, ServiceLimits},
    },
};

/// Reads the whole file and its folder.
pub(crate) fn service(root: Section<'_>) -> Option<ServiceConfig> {
    let environment = root.sources.environment();
    let connection_string = parts::connection_string(&root);
    if connection_string.as_ref().is_some_and(|text| matches!(text.owner, Owner::Device(_))) {
        let reason = "holds a device's connection string; a service needs a policy's, as culvert hub init prints it";
        root.problem("connection_string_file", reason);
    }
    let ca = parts::certificates(&root, "ca_file");
    let proxy = parts::proxy(&root);
    let state_dir = root.optional("state_dir").unwrap_or_else(|| environment.state_dir("service"));
    let control_socket = root.optional("control_socket").unwrap_or_else(|| environment.control_socket("service"));
    let forwards = forwards(&root);
    let limits = limits(&root);
    let log = parts::log(&root);
    let resume_for = root.optional("resume_for");
    let metrics = parts::metrics(&root, ServiceConfig::default_metrics());
    root.finish();
    let base = ServiceConfig::new(connection_string?, state_dir);
    Some(ServiceConfig {
        ca,
        proxy,
        control_socket: Some(control_socket),
        resume_for: resume_for.unwrap_or(base.resume_for),
        forwards,
        limits,
        metrics,
        log,
        ..base
    })
}

fn forwards(root: &Section<'_>) -> Vec<ForwardRule> {
    let rules = rules(root, "forward", "forwards.d", forward);
    refuse_duplicates(root.sources, "forward.name", rules.iter().map(|(rule, at)| (&rule.name, at)));
    for (index, (rule, at)) in rules.iter().enumerate() {
        let first = rules[..index].iter().find(|(other, _)| clash(&rule.listen, &other.listen));
        if let Some((other, first)) = first {
            root.sources.problem(Problem {
                file: at.file.clone(),
                line: at.line,
                key: "forward.listen".into(),
                reason: format!("{} is taken already by {}, at {first}", rule.listen, other.name),
            });
        }
    }
    rules.into_iter().map(|(rule, _)| rule).collect()
}

/// True if one listener keeps the other from binding: the same address, or the same port and one of them on all
/// addresses of the other's family.
fn clash(a: &ListenAddress, b: &ListenAddress) -> bool {
    match (a.port(), b.port()) {
        (None, None) => a == b,
        (Some(0), _) | (_, Some(0)) => false,
        (port, other) => port == other && hosts_clash(a.host().unwrap_or_default(), b.host().unwrap_or_default()),
    }
}

/// What a name stands for is not known here; a listener on all addresses has it in any case that matters.
fn hosts_clash(a: &str, b: &str) -> bool {
    // The zone of a link-local address says which link: the same address on another one is another.
    let parsed = |host: &str| {
        let (address, zone) = host.split_once('%').unwrap_or((host, ""));
        Some((address.parse::<IpAddr>().ok()?, zone.to_owned()))
    };
    let is_everywhere = |address: &IpAddr| address.is_unspecified();
    match (parsed(a), parsed(b)) {
        (Some((a, zone)), Some((b, other))) => {
            let family = a.is_ipv4() == b.is_ipv4();
            (a == b && zone == other) || (family && (is_everywhere(&a) || is_everywhere(&b)))
        }
        (Some((address, _)), None) | (None, Some((address, _))) => is_everywhere(&address),
        (None, None) => a.eq_ignore_ascii_case(b),
    }
}

fn forward(section: Section<'_>) -> Option<(ForwardRule, Location)> {
    let name: Option<Name> = section.required("name");
    if name.as_ref().is_some_and(|name| name.as_str().starts_with(RESERVED)) {
        section.problem("name", format!("names that begin with {} are culvert's own", RESERVED));
    }
    let listen = section.required("listen");
    listen.iter().for_each(|listen| warn_if_public(&section, listen));
    let device = section.required("device");
    let module = section.optional("module");
    let target: Option<Name> = section.required("target");
    if target.as_ref().is_some_and(|target| target.as_str().starts_with(RESERVED)) {
        section.problem("target", format!("no device has targets that begin with {RESERVED}"));
    }
    let mode = section.optional("mode").unwrap_or_default();
    let connect = section.optional("connect").unwrap_or_default();
    let plain_eof = section.optional("plain_eof").unwrap_or_default();
    let max_connections = section.count("max_connections");
    let drain_timeout = section.optional("drain_timeout");
    let connect_timeout = section.timeout("connect_timeout");
    if mode == ForwardMode::Plain && section.has("connect") {
        section
            .problem("connect", "belongs to mode = \"mux\": in plain mode each connection opens its own device stream");
    }
    if mode == ForwardMode::Mux && section.has("plain_eof") {
        section.problem("plain_eof", "belongs to mode = \"plain\"");
    }
    let at = section.location("name");
    section.finish();
    let base = ForwardRule::new(name?, listen?, device?, target?);
    let rule = ForwardRule {
        module,
        mode,
        connect,
        plain_eof,
        max_connections: max_connections.unwrap_or(base.max_connections),
        drain_timeout: drain_timeout.unwrap_or(base.drain_timeout),
        connect_timeout: connect_timeout.unwrap_or(base.connect_timeout),
        ..base
    };
    Some((rule, at))
}

fn warn_if_public(section: &Section<'_>, listen: &ListenAddress) {
    let Some(Ok(ip)) = listen.host().map(str::parse::<IpAddr>) else { return };
    if !ip.is_loopback() {
        section.warn("listen", "is reachable from the network: whoever reaches this port reaches the target");
    }
}

fn limits(root: &Section<'_>) -> ServiceLimits {
    let section = root.section("limits");
    let link = root.sources.environment().service_link_limits();
    let mut limits = ServiceLimits { link, ..ServiceLimits::default() };
    section.set_count("max_connections", &mut limits.max_connections);
    section.set_count("max_connections_per_device", &mut limits.max_connections_per_device);
    parts::link_limits(&section, &mut limits.link);
    section.finish();
    limits
}

impl std::str::FromStr for ForwardMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "mux" => Ok(Self::Mux),
            "plain" => Ok(Self::Plain),
            other => Err(format!("{other:?} is not a mode; write mux or plain")),
        }
    }
}

impl std::str::FromStr for ConnectMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "start" => Ok(Self::Start),
            "on-demand" => Ok(Self::OnDemand),
            other => Err(format!("{other:?} is not a time to connect; write start or on-demand")),
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn listeners_clash_on_a_port_that_one_of_them_takes_everywhere() {
        let clash = |a: &str, b: &str| super::clash(&a.parse().unwrap(), &b.parse().unwrap());
        assert!(clash("127.0.0.1:22", "127.0.0.1:22"));
        assert!(clash("0.0.0.0:22", "127.0.0.1:22"));
        assert!(clash("[::1]:22", "[::]:22"));
        assert!(clash("[::1]:22", "[0:0:0:0:0:0:0:1]:22"));
        assert!(clash("localhost:22", "[::]:22") && clash("0.0.0.0:22", "localhost:22"));
        assert!(clash("localhost:22", "LocalHost:22"));
        assert!(clash("[fe80::1%eth0]:22", "[::]:22"));
        assert!(!clash("0.0.0.0:22", "[::]:22"));
        assert!(!clash("0.0.0.0:22", "[::1]:22") && !clash("127.0.0.1:22", "[::]:22"));
        assert!(!clash("0.0.0.0:22", "[fe80::1%eth0]:22"));
        assert!(!clash("[fe80::1%eth0]:22", "[fe80::1%eth1]:22"));
        assert!(clash("unix:/a", "unix:/a"));
        assert!(!clash("127.0.0.1:22", "127.0.0.2:22"));
        assert!(!clash("127.0.0.1:22", "[::1]:22"));
        assert!(!clash("127.0.0.1:0", "127.0.0.1:0"));
        assert!(!clash("unix:/a", "127.0.0.1:22"));
    }
}
