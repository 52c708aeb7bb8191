//! What the device daemon counts beside its targets.
//!
//! Owns metric names. Does not know a registry until one is handed in. Invariant: no labels that peers choose.

use prometheus::{IntCounter, IntGauge, Registry};

/// Counters of the device.
#[derive(Clone)]
pub struct DeviceMetrics {
    /// 1 while the control session is up.
    pub(super) connected: IntGauge,
    /// Mux device streams open now.
    pub(super) services: IntGauge,
    /// Stream requests received.
    pub(super) requests: IntCounter,
}

impl Default for DeviceMetrics {
    fn default() -> Self {
        let gauge =
            |name: &str, help: &str| IntGauge::new(name, help).unwrap_or_else(|error| panic!("metric name: {error}"));
        let counter =
            |name: &str, help: &str| IntCounter::new(name, help).unwrap_or_else(|error| panic!("metric name: {error}"));
        Self {
            connected: gauge("culvert_device_hub_connected", "1 while the control session with the hub is up."),
            services: gauge("culvert_device_mux_streams", "Mux device streams open now, one per service daemon."),
            requests: counter("culvert_device_stream_requests_total", "Stream requests received from the hub."),
        }
    }
}

impl DeviceMetrics {
    /// Hands the metrics to a registry.
    pub fn register(&self, registry: &Registry) -> Result<(), prometheus::Error> {
        registry.register(Box::new(self.connected.clone()))?;
        registry.register(Box::new(self.services.clone()))?;
        registry.register(Box::new(self.requests.clone()))
    }
}
