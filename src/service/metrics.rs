//! What the service daemon counts beside its forwards.
//!
//! Owns metric names. Does not know a registry until one is handed in. Invariant: a device is a label only because an
//! operator wrote it into a forward.

use prometheus::{IntCounterVec, IntGaugeVec, Opts, Registry};

use crate::base::Identity;

/// Counters of the service's device streams.
#[derive(Clone)]
pub struct ServiceMetrics {
    open: IntGaugeVec,
    opened: IntCounterVec,
    failed: IntCounterVec,
    usable: IntGaugeVec,
    hub: prometheus::IntGauge,
}

impl Default for ServiceMetrics {
    fn default() -> Self {
        let gauge = |name: &str, help: &str, label: &str| IntGaugeVec::new(Opts::new(name, help), &[label]);
        let counter = |name: &str, help: &str| IntCounterVec::new(Opts::new(name, help), &["device"]);
        let bad = |error: prometheus::Error| -> ! { panic!("metric name: {error}") };
        Self {
            open: gauge("culvert_service_device_streams", "Mux device streams open now, by device.", "device")
                .unwrap_or_else(|error| bad(error)),
            opened: counter("culvert_service_device_streams_opened_total", "Mux device streams opened, by device.")
                .unwrap_or_else(|error| bad(error)),
            failed: counter(
                "culvert_service_device_stream_failures_total",
                "Attempts at a mux device stream that failed, by device.",
            )
            .unwrap_or_else(|error| bad(error)),
            usable: gauge(
                "culvert_forward_usable",
                "1 if an echo came back through the forward's device stream, 0 if not.",
                "forward",
            )
            .unwrap_or_else(|error| bad(error)),
            hub: prometheus::IntGauge::new(
                "culvert_service_hub_usable",
                "1 if the hub answered and accepted the service's credential at the last check.",
            )
            .unwrap_or_else(|error| bad(error)),
        }
    }
}

impl ServiceMetrics {
    /// Hands the metrics to a registry.
    pub fn register(&self, registry: &Registry) -> Result<(), prometheus::Error> {
        for family in [&self.open, &self.usable] {
            registry.register(Box::new(family.clone()))?;
        }
        for family in [&self.opened, &self.failed] {
            registry.register(Box::new(family.clone()))?;
        }
        registry.register(Box::new(self.hub.clone()))
    }

    pub(super) fn opened(&self, device: &Identity) {
        let device = device.to_string();
        self.open.with_label_values(&[&device]).set(1);
        self.opened.with_label_values(&[&device]).inc();
    }

    pub(super) fn ended(&self, device: &Identity) {
        self.open.with_label_values(&[device.to_string()]).set(0);
    }

    pub(super) fn attempt_failed(&self, device: &Identity) {
        self.failed.with_label_values(&[device.to_string()]).inc();
    }

    pub(super) fn set_usable(&self, forward: &str, is_usable: bool) {
        self.usable.with_label_values(&[forward]).set(i64::from(is_usable));
    }

    pub(super) fn forget_forward(&self, forward: &str) {
        // An error means that there was no such series.
        let _ = self.usable.remove_label_values(&[forward]);
    }

    pub(super) fn set_hub_usable(&self, is_usable: bool) {
        self.hub.set(i64::from(is_usable));
    }
}
