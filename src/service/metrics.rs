//! What the service daemon counts beside its forwards.
//!
//! Owns metric names. Does not know a registry until one is handed in. Invariant: a device is a label only because an
//! operator wrote it into a forward.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

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
    /// The devices that forwards name. What people type at `culvert connect` is no label.
    named: Arc<Mutex<BTreeSet<Identity>>>,
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
            named: Arc::default(),
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

    /// From now on these devices are labels; the series of others are gone.
    pub(super) fn set_named(&self, devices: &BTreeSet<Identity>) {
        let mut named = self.named();
        for device in named.difference(devices) {
            let label = &[device.to_string()];
            // An error means that there was no such series.
            let _ = self.open.remove_label_values(label);
            let _ = self.opened.remove_label_values(label);
            let _ = self.failed.remove_label_values(label);
        }
        named.clone_from(devices);
    }

    pub(super) fn opened(&self, device: &Identity) {
        let label = self.label(device);
        self.opened.with_label_values(&[&label]).inc();
        self.set_open(&label, true);
    }

    pub(super) fn ended(&self, device: &Identity) {
        self.set_open(&self.label(device), false);
    }

    fn set_open(&self, label: &str, is_open: bool) {
        // Of the unnamed there may be several.
        if !label.is_empty() {
            self.open.with_label_values(&[label]).set(i64::from(is_open));
        }
    }

    pub(super) fn attempt_failed(&self, device: &Identity) {
        self.failed.with_label_values(&[self.label(device)]).inc();
    }

    fn label(&self, device: &Identity) -> String {
        if self.named().contains(device) { device.to_string() } else { String::new() }
    }

    fn named(&self) -> MutexGuard<'_, BTreeSet<Identity>> {
        self.named.lock().unwrap_or_else(PoisonError::into_inner)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_devices_that_forwards_name_are_labels() {
        let (metrics, registry) = (ServiceMetrics::default(), Registry::new());
        metrics.register(&registry).unwrap();
        let (named, typed): (Identity, Identity) = ("pump-17".parse().unwrap(), "typo".parse().unwrap());
        metrics.set_named(&BTreeSet::from([named.clone()]));
        for device in [&named, &typed] {
            metrics.opened(device);
            metrics.attempt_failed(device);
        }
        let text = || prometheus::TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        assert!(text().contains("culvert_service_device_streams{device=\"pump-17\"} 1") && !text().contains("typo"));
        metrics.ended(&named);
        assert!(text().contains("culvert_service_device_streams{device=\"pump-17\"} 0"));
        metrics.set_named(&BTreeSet::new());
        metrics.ended(&named);
        assert!(!text().contains("pump-17"));
    }
}
