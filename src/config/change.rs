//! What a new configuration changes, and when each change comes into force.
//!
//! Owns the class of every field. Does not know how a change is applied. Invariant: a field without a class does
//! not compile.

use std::fmt;

use super::{
    device::{DeviceConfig, DeviceLimits, TargetRule},
    hub::{HubConfig, PolicyRule},
    parts::{LinkLimits, LogConfig},
    service::{ForwardRule, ServiceConfig, ServiceLimits},
};
use crate::base::Name;

/// One difference between the configuration in force and a new one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The field, as in `log.level`, or the rule, as in `forward pump-17-ssh`.
    pub what: String,
    /// What happens to it.
    pub kind: ChangeKind,
    /// When it comes into force.
    pub class: ChangeClass,
}

/// What happens to a field or a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeKind {
    /// The rule is new.
    Added,
    /// The rule is gone.
    Removed,
    /// The value is another.
    Changed,
}

/// When a change comes into force.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ChangeClass {
    /// At once.
    Live,
    /// With the next connection to the hub, which is tried beside the one in use.
    NextCarrier,
    /// When the daemon is restarted.
    Restart,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            ChangeKind::Added => "added",
            ChangeKind::Removed => "removed",
            ChangeKind::Changed => "changed",
        };
        let class = match self.class {
            ChangeClass::Live => "takes effect at once",
            ChangeClass::NextCarrier => "takes effect with the next connection to the hub",
            ChangeClass::Restart => "restart needed",
        };
        write!(f, "{}: {kind} ({class})", self.what)
    }
}

/// A configuration, or a part of one, whose fields know when a change comes into force.
pub trait Changes: Sized + PartialEq {
    /// Every difference from `self`, in force, to `next`.
    fn changes(&self, next: &Self) -> Vec<Change> {
        let mut changes = Vec::new();
        self.compare(next, "", &mut changes);
        changes
    }

    /// This configuration as far as a running daemon can follow it: the fields that need a restart keep the values
    /// of `running`. A later comparison with the file shows them again, until the restart or until they are
    /// changed back.
    #[must_use]
    fn without_restart(mut self, running: &Self) -> Self {
        self.keep(running);
        self
    }

    /// Adds every difference to `changes`, each field's name behind `prefix`.
    fn compare(&self, next: &Self, prefix: &str, changes: &mut Vec<Change>);

    /// Takes back the fields that need a restart.
    fn keep(&mut self, running: &Self);
}

trait Rule: PartialEq {
    const KIND: &'static str;
    fn name(&self) -> &Name;
}

macro_rules! rule {
    ($type:ty, $kind:literal) => {
        impl Rule for $type {
            const KIND: &'static str = $kind;
            fn name(&self) -> &Name {
                &self.name
            }
        }
    };
}

rule!(ForwardRule, "forward");
rule!(TargetRule, "target");
rule!(PolicyRule, "policy");

fn compare_rules<R: Rule>(running: &[R], next: &[R], changes: &mut Vec<Change>) {
    let mut note = |rule: &R, kind| {
        changes.push(Change { what: format!("{} {}", R::KIND, rule.name()), kind, class: ChangeClass::Live });
    };
    for rule in running {
        match next.iter().find(|other| other.name() == rule.name()) {
            None => note(rule, ChangeKind::Removed),
            Some(other) if other != rule => note(rule, ChangeKind::Changed),
            Some(_) => {}
        }
    }
    for rule in next.iter().filter(|rule| running.iter().all(|other| other.name() != rule.name())) {
        note(rule, ChangeKind::Added);
    }
}

/// Gives each field of a type its class: `Live`, `NextCarrier`, `Restart`, `Rules` (by name, live), `Within` (a
/// section whose own fields have classes) or `Flat` (the same, but written in the section of its owner).
macro_rules! classes {
    ($type:ident { $($field:ident: $class:ident),* $(,)? }) => {
        impl Changes for $type {
            fn compare(&self, next: &Self, prefix: &str, changes: &mut Vec<Change>) {
                let Self { $($field),* } = self;
                $(classes!(@compare $class, $field, &next.$field, prefix, changes);)*
            }

            fn keep(&mut self, running: &Self) {
                let Self { $($field),* } = self;
                $(classes!(@keep $class, $field, &running.$field);)*
            }
        }
    };
    (@compare Within, $field:ident, $next:expr, $prefix:ident, $changes:ident) => {
        $field.compare($next, &format!("{}{}.", $prefix, stringify!($field)), $changes)
    };
    (@compare Flat, $field:ident, $next:expr, $prefix:ident, $changes:ident) => {
        $field.compare($next, $prefix, $changes)
    };
    (@compare Rules, $field:ident, $next:expr, $prefix:ident, $changes:ident) => {
        compare_rules($field, $next, $changes)
    };
    (@compare $class:ident, $field:ident, $next:expr, $prefix:ident, $changes:ident) => {
        if $field != $next {
            let what = format!("{}{}", $prefix, stringify!($field));
            $changes.push(Change { what, kind: ChangeKind::Changed, class: ChangeClass::$class });
        }
    };
    (@keep Restart, $field:ident, $running:expr) => { $field.clone_from($running) };
    (@keep Within, $field:ident, $running:expr) => { $field.keep($running) };
    (@keep Flat, $field:ident, $running:expr) => { $field.keep($running) };
    (@keep $class:ident, $field:ident, $running:expr) => { let _ = $field; };
}

classes!(HubConfig {
    hostname: Restart,
    listen: Restart,
    mqtt_listen: Restart,
    public_url: Live,
    state_dir: Restart,
    control_socket: Restart,
    tls: Live,
    client_ca: Live,
    allowed_origins: Live,
    policies: Rules,
    limits: Live,
    metrics: Restart,
    log: Within,
    resource_log: Restart,
});

classes!(DeviceConfig {
    connection_string: NextCarrier,
    certificate: NextCarrier,
    ca: NextCarrier,
    proxy: NextCarrier,
    state_dir: Restart,
    control_socket: Restart,
    resume_for: NextCarrier,
    targets: Rules,
    limits: Within,
    metrics: Restart,
    log: Within,
});

classes!(DeviceLimits { max_services: Live, max_plain: Live, max_connections: Live, link: Flat });

classes!(ServiceConfig {
    connection_string: NextCarrier,
    ca: NextCarrier,
    proxy: NextCarrier,
    state_dir: Restart,
    control_socket: Restart,
    resume_for: NextCarrier,
    forwards: Rules,
    limits: Within,
    metrics: Restart,
    log: Within,
});

classes!(ServiceLimits { max_connections: Live, max_connections_per_device: Live, link: Flat });
classes!(LinkLimits {
    max_channels: NextCarrier,
    max_buffered: NextCarrier,
    max_replay: NextCarrier,
    max_replay_total: Restart,
});
classes!(LogConfig { level: Live, format: Restart });

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LogFormat;

    fn service() -> ServiceConfig {
        let text = "HostName=h;SharedAccessKeyName=p;SharedAccessKey=Y2FuYXJ5LWNhbmFyeS1jYW5hcnktY2FuYXJ5LTEyMzQ=";
        ServiceConfig::new(text.parse().unwrap(), "/var/lib/culvert/service")
    }

    fn forward(name: &str, listen: &str) -> ForwardRule {
        let (device, target) = ("pump-17".parse().unwrap(), "ssh".parse().unwrap());
        ForwardRule::new(name.parse().unwrap(), listen.parse().unwrap(), device, target)
    }

    fn printed(running: &ServiceConfig, next: &ServiceConfig) -> Vec<String> {
        running.changes(next).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn every_difference_is_named_with_its_class() {
        let mut running = service();
        running.forwards = vec![forward("gone", "[::1]:1"), forward("same", "[::1]:2"), forward("moved", "[::1]:3")];
        let mut next = running.clone();
        assert!(printed(&running, &next).is_empty());
        next.forwards = vec![forward("new", "[::1]:1"), forward("moved", "[::1]:4"), forward("same", "[::1]:2")];
        next.proxy = crate::config::ProxyRule::Off;
        next.log.level = "debug".into();
        next.log.format = LogFormat::Json;
        next.limits.link.max_replay_total = 1 << 30;
        assert_eq!(
            printed(&running, &next),
            [
                "proxy: changed (takes effect with the next connection to the hub)",
                "forward gone: removed (takes effect at once)",
                "forward moved: changed (takes effect at once)",
                "forward new: added (takes effect at once)",
                "limits.max_replay_total: changed (restart needed)",
                "log.level: changed (takes effect at once)",
                "log.format: changed (restart needed)",
            ]
        );
    }

    #[test]
    fn what_needs_a_restart_stays_until_the_restart() {
        let running = service();
        let mut file = running.clone();
        file.log = LogConfig { level: "debug".into(), format: LogFormat::Json };
        let now = file.clone().without_restart(&running);
        assert_eq!(now.log, LogConfig { level: "debug".into(), format: LogFormat::Auto });
        assert_eq!(printed(&now, &file), ["log.format: changed (restart needed)"]);
    }
}
