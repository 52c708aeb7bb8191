//! The hub's counters and gauges.
//!
//! Owns every metric of the hub. Does not know who scrapes them. Invariant: labels come from bounded sets;
//! no device ID, no peer address.

use prometheus::{IntCounter, IntCounterVec, IntGauge, Opts, Registry, core::Collector};

/// What the hub counts. Clones share their values.
#[derive(Debug, Clone)]
pub struct HubMetrics {
    /// Control sessions attached at this moment.
    pub device_sessions: IntGauge,
    /// Control sessions that began, by `result`: accepted, unauthorized, protocol_error, timeout, taken_over...
    pub control_sessions: IntCounterVec,
    /// Telemetry messages acknowledged.
    pub telemetry: IntCounter,
    /// Bridges whose two sides are joined at this moment.
    pub bridges_open: IntGauge,
    /// Bridges that ended, by `reason`.
    pub bridges: IntCounterVec,
    /// Payload bytes relayed, by `direction`: to_device, to_service.
    pub relayed_bytes: IntCounterVec,
    /// Stream initiations, by `result`.
    pub initiations: IntCounterVec,
    /// HTTP requests, by `route` and `code`.
    pub requests: IntCounterVec,
    /// Connections refused or ended by a limit, by `limit`.
    pub limited: IntCounterVec,
    /// Connections accepted on the public listeners, by `listener`: https, mqtt.
    pub connections: IntCounterVec,
    /// TLS handshakes that failed, by `listener`.
    pub tls_failures: IntCounterVec,
    /// Connections open on the public listeners.
    pub connections_open: IntGauge,
    /// When the certificate in use ends, in seconds since 1970; 0 if that cannot be told.
    pub certificate_not_after: IntGauge,
    /// Tasks that panicked: a bug in culvert.
    pub task_panics: IntCounter,
    /// DeviceStreams records that could not be written.
    pub resource_log_failures: IntCounter,
}

impl Default for HubMetrics {
    fn default() -> Self {
        Self {
            device_sessions: gauge("culvert_hub_device_sessions", "Control sessions attached at this moment."),
            control_sessions: vec("culvert_hub_control_sessions_total", "Control sessions by result.", &["result"]),
            telemetry: counter("culvert_hub_telemetry_messages_total", "Telemetry messages acknowledged."),
            bridges_open: gauge("culvert_hub_bridges_open", "Device streams whose two sides are joined."),
            bridges: vec("culvert_hub_bridges_total", "Device streams that ended, by reason.", &["reason"]),
            relayed_bytes: vec("culvert_hub_relayed_bytes_total", "Payload bytes relayed.", &["direction"]),
            initiations: vec("culvert_hub_initiations_total", "Stream initiations by result.", &["result"]),
            requests: vec("culvert_hub_http_requests_total", "HTTP requests.", &["route", "code"]),
            limited: vec("culvert_hub_limited_total", "Connections refused or ended by a limit.", &["limit"]),
            connections: vec("culvert_hub_connections_total", "Connections accepted.", &["listener"]),
            tls_failures: vec("culvert_hub_tls_failures_total", "TLS handshakes that failed.", &["listener"]),
            connections_open: gauge("culvert_hub_connections_open", "Connections open on the public listeners."),
            certificate_not_after: gauge(
                "culvert_hub_certificate_not_after_timestamp_seconds",
                "When the certificate in use ends, in seconds since 1970.",
            ),
            task_panics: counter("culvert_hub_task_panics_total", "Connection tasks that panicked: a bug."),
            resource_log_failures: counter(
                "culvert_hub_resource_log_failures_total",
                "DeviceStreams records that could not be written.",
            ),
        }
    }
}

impl HubMetrics {
    /// Makes every metric visible in `registry`.
    pub fn register(&self, registry: &Registry) -> prometheus::Result<()> {
        let all: [Box<dyn Collector>; 15] = [
            Box::new(self.device_sessions.clone()),
            Box::new(self.control_sessions.clone()),
            Box::new(self.telemetry.clone()),
            Box::new(self.bridges_open.clone()),
            Box::new(self.bridges.clone()),
            Box::new(self.relayed_bytes.clone()),
            Box::new(self.initiations.clone()),
            Box::new(self.requests.clone()),
            Box::new(self.limited.clone()),
            Box::new(self.connections.clone()),
            Box::new(self.tls_failures.clone()),
            Box::new(self.connections_open.clone()),
            Box::new(self.certificate_not_after.clone()),
            Box::new(self.task_panics.clone()),
            Box::new(self.resource_log_failures.clone()),
        ];
        all.into_iter().try_for_each(|collector| registry.register(collector))
    }
}

/// One more in a gauge, for as long as it lives.
#[derive(Debug)]
pub(in crate::hub) struct Counted(IntGauge);

impl Counted {
    pub(in crate::hub) fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

// The names and labels are constants that a test registers: they cannot be malformed at run time.

fn counter(name: &str, help: &str) -> IntCounter {
    IntCounter::new(name, help).expect("a valid metric name")
}

fn gauge(name: &str, help: &str) -> IntGauge {
    IntGauge::new(name, help).expect("a valid metric name")
}

fn vec(name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    IntCounterVec::new(Opts::new(name, help), labels).expect("a valid metric name")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_registers_once() {
        let registry = Registry::new();
        let metrics = HubMetrics::default();
        metrics.register(&registry).unwrap();
        metrics.requests.with_label_values(&["streams", "200"]).inc();
        assert!(registry.gather().iter().all(|family| family.name().starts_with("culvert_hub_")));
    }
}
