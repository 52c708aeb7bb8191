//! The metrics that every daemon has, whatever its role.
//!
//! Owns the build's version, the verdict on the last reload, and the count of panicked tasks. Does not know a
//! role's own metrics. Invariant: a panic anywhere in the process is counted and logged on one line.

use std::sync::atomic::{AtomicU64, Ordering};

use prometheus::{
    IntCounter, IntGauge, IntGaugeVec, Opts, Registry,
    core::{Collector, Desc},
    proto::MetricFamily,
};

use super::process::ProcessCollector;

/// The metrics of any daemon.
#[derive(Debug, Clone)]
pub struct DaemonMetrics {
    /// `culvert_config_last_reload_successful`: 1 after a good load, 0 after a refused one.
    pub reload_successful: IntGauge,
    /// `culvert_config_last_reload_success_timestamp_seconds`.
    pub reload_time: IntGauge,
    /// `culvert_config_restart_needed`: 1 while the file differs from what runs in a field that needs a restart.
    pub restart_needed: IntGauge,
}

impl DaemonMetrics {
    /// Registers the metrics of a daemon of this role, those of its process included.
    pub fn register(role: &str, registry: &Registry) -> Result<Self, prometheus::Error> {
        let build = IntGaugeVec::new(
            Opts::new("culvert_build_info", "Always 1; the labels name the version and the role."),
            &["version", "role"],
        )?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION"), role]).set(1);
        registry.register(Box::new(build))?;
        registry.register(Box::new(ProcessCollector::new()?))?;
        registry.register(Box::new(PanicCollector::new()?))?;
        Ok(Self {
            reload_successful: gauge(
                registry,
                "culvert_config_last_reload_successful",
                "1 if the configuration file was accepted when it was last read, else 0.",
            )?,
            reload_time: gauge(
                registry,
                "culvert_config_last_reload_success_timestamp_seconds",
                "When a configuration was last accepted, in seconds since 1970.",
            )?,
            restart_needed: gauge(
                registry,
                "culvert_config_restart_needed",
                "1 while the configuration file asks for a change that only a restart makes.",
            )?,
        })
    }

    /// A configuration was accepted now.
    pub fn reload_succeeded(&self) {
        self.reload_successful.set(1);
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs());
        self.reload_time.set(i64::try_from(now).unwrap_or(i64::MAX));
    }

    /// A configuration was refused; what ran before still runs.
    pub fn reload_failed(&self) {
        self.reload_successful.set(0);
    }
}

fn gauge(registry: &Registry, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
    let gauge = IntGauge::new(name, help)?;
    registry.register(Box::new(gauge.clone()))?;
    Ok(gauge)
}

/// Panics in this process. A panic hook is process-wide, so is its count.
static PANICS: AtomicU64 = AtomicU64::new(0);

/// From now on a panic is one ERROR line and one count, not a trace on standard error.
pub fn count_panics() {
    std::panic::set_hook(Box::new(|panic| {
        PANICS.fetch_add(1, Ordering::Relaxed);
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let reason = panic.payload_as_str().unwrap_or("no message");
        tracing::error!(%place, %reason, "a task panicked; this is a bug in culvert");
    }));
}

struct PanicCollector {
    counter: IntCounter,
}

impl PanicCollector {
    fn new() -> Result<Self, prometheus::Error> {
        let help = "Tasks that ended by a panic. Each is a bug.";
        Ok(Self { counter: IntCounter::new("culvert_task_panics_total", help)? })
    }
}

impl Collector for PanicCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.counter.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let seen = PANICS.load(Ordering::Relaxed);
        self.counter.inc_by(seen.saturating_sub(self.counter.get()));
        self.counter.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_shows_its_build_its_process_and_its_reloads() {
        let registry = Registry::new();
        let metrics = DaemonMetrics::register("hub", &registry).unwrap();
        metrics.reload_succeeded();
        let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        for wanted in [
            "culvert_build_info{role=\"hub\",version=",
            "culvert_config_last_reload_successful 1",
            "culvert_task_panics_total 0",
            "process_open_fds ",
            "process_cpu_seconds_total ",
        ] {
            assert!(text.contains(wanted), "{wanted} is missing in\n{text}");
        }
    }
}
