//! What forwards and targets count.
//!
//! Owns the metric names and labels. Does not know a registry until one is handed in. Invariant: labels are rule
//! names, directions and reasons only.

use prometheus::{IntCounter, IntCounterVec, IntGaugeVec, Opts, Registry};

use super::flow::{FlowOptions, Reason};
use crate::base::Name;

/// Counters of the service's forwards.
#[derive(Clone)]
pub struct ForwardMetrics {
    rules: RuleMetrics,
    listening: IntGaugeVec,
}

/// Counters of the device's targets.
#[derive(Clone)]
pub struct TargetMetrics(RuleMetrics);

/// What both count, under `culvert_{label}_...{label="NAME"}`.
#[derive(Clone)]
struct RuleMetrics {
    open: IntGaugeVec,
    ended: IntCounterVec,
    bytes: IntCounterVec,
}

impl RuleMetrics {
    fn new(label: &'static str) -> Self {
        let name = |what: &str| format!("culvert_{label}_{what}");
        let opts = |what: &str, help: &str| Opts::new(name(what), help.to_owned());
        Self {
            open: gauge(opts("flows", "Connections open now."), &[label]),
            ended: counter(opts("flows_ended_total", "Connections that ended, by reason."), &[label, "reason"]),
            bytes: counter(opts("bytes_total", "Bytes carried, by direction."), &[label, "direction"]),
        }
    }

    fn register(&self, registry: &Registry) -> Result<(), prometheus::Error> {
        registry.register(Box::new(self.open.clone()))?;
        registry.register(Box::new(self.ended.clone()))?;
        registry.register(Box::new(self.bytes.clone()))
    }

    fn begin(&self, rule: &Name) -> OpenFlow {
        let gauge = self.open.with_label_values(&[rule.as_str()]);
        gauge.inc();
        OpenFlow(gauge)
    }

    fn bytes(&self, rule: &Name, direction: &str) -> IntCounter {
        self.bytes.with_label_values(&[rule.as_str(), direction])
    }

    fn options(&self, rule: &Name, half_close: bool) -> FlowOptions {
        FlowOptions { half_close, sent: self.bytes(rule, "sent"), received: self.bytes(rule, "received") }
    }
}

/// Counts one open flow for as long as it lives.
pub(crate) struct OpenFlow(prometheus::IntGauge);

impl Drop for OpenFlow {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Default for ForwardMetrics {
    fn default() -> Self {
        let opts = Opts::new("culvert_forward_listening", "1 if the forward's listener is open.");
        Self { rules: RuleMetrics::new("forward"), listening: gauge(opts, &["forward"]) }
    }
}

impl ForwardMetrics {
    /// Hands the metrics to a registry.
    pub fn register(&self, registry: &Registry) -> Result<(), prometheus::Error> {
        registry.register(Box::new(self.listening.clone()))?;
        self.rules.register(registry)
    }

    /// Notes whether the forward's listener is open.
    pub(crate) fn set_listening(&self, rule: &Name, is_listening: bool) {
        self.listening.with_label_values(&[rule.as_str()]).set(i64::from(is_listening));
    }

    /// Forgets a forward that was removed.
    pub(crate) fn forget(&self, rule: &Name) {
        // An error means that there was no such series.
        let _ = self.listening.remove_label_values(&[rule.as_str()]);
    }

    pub(crate) fn begin(&self, rule: &Name) -> OpenFlow {
        self.rules.begin(rule)
    }

    pub(crate) fn options(&self, rule: &Name, half_close: bool) -> FlowOptions {
        self.rules.options(rule, half_close)
    }

    pub(crate) fn ended(&self, rule: &Name, reason: Reason) {
        self.rules.ended.with_label_values(&[rule.as_str(), reason.as_str()]).inc();
    }
}

impl Default for TargetMetrics {
    fn default() -> Self {
        Self(RuleMetrics::new("target"))
    }
}

impl TargetMetrics {
    /// Hands the metrics to a registry.
    pub fn register(&self, registry: &Registry) -> Result<(), prometheus::Error> {
        self.0.register(registry)
    }

    pub(crate) fn begin(&self, rule: &Name) -> OpenFlow {
        self.0.begin(rule)
    }

    pub(crate) fn options(&self, rule: &Name, half_close: bool) -> FlowOptions {
        self.0.options(rule, half_close)
    }

    pub(crate) fn ended(&self, rule: &str, reason: Reason) {
        self.0.ended.with_label_values(&[rule, reason.as_str()]).inc();
    }
}

/// A gauge family; the names here are constants that a test registers, so a bad one cannot ship.
fn gauge(opts: Opts, labels: &[&str]) -> IntGaugeVec {
    IntGaugeVec::new(opts, labels).unwrap_or_else(|error| panic!("metric name: {error}"))
}

fn counter(opts: Opts, labels: &[&str]) -> IntCounterVec {
    IntCounterVec::new(opts, labels).unwrap_or_else(|error| panic!("metric name: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_families_register_side_by_side_and_gauges_fall_back() {
        let registry = Registry::new();
        let (forwards, targets) = (ForwardMetrics::default(), TargetMetrics::default());
        forwards.register(&registry).unwrap();
        targets.register(&registry).unwrap();
        let name: Name = "ssh".parse().unwrap();
        let open = forwards.begin(&name);
        forwards.ended(&name, Reason::Done);
        assert_eq!(forwards.rules.open.with_label_values(&["ssh"]).get(), 1);
        drop(open);
        assert_eq!(forwards.rules.open.with_label_values(&["ssh"]).get(), 0);
        assert_eq!(forwards.rules.ended.with_label_values(&["ssh", "done"]).get(), 1);
    }
}
