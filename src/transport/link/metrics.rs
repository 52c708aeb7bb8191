//! What links count.
//!
//! Owns the counters and their names. Does not know links. Invariant: every label comes from a fixed set of words.

use std::time::Duration;

use prometheus::{
    Counter, Histogram, HistogramOpts, IntCounterVec, IntGauge, Opts, Registry,
    core::{Collector, Desc},
    proto::MetricFamily,
};

/// Stalls that matter: unnoticed, a hiccup, a hand-over, a dead path, a sleep, an outage.
const STALL_BUCKETS: &[f64] = &[0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0];

/// Counters of all links of a process. Clones count into the same place.
#[derive(Clone, Debug)]
pub struct LinkMetrics {
    /// Links that exist.
    pub links: IntGauge,
    /// Links that have a carrier.
    pub attached: IntGauge,
    /// Resumes, by what had ended the carrier before.
    pub resumes: IntCounterVec,
    /// Seconds that links spent without a carrier.
    pub detached_seconds: Counter,
    /// Bytes held until the other side has consumed them.
    pub replay_bytes: IntGauge,
    /// Bytes sent again after resumes.
    pub replayed_bytes: Counter,
    /// Seconds from the loss of a carrier to the next one.
    pub stall_seconds: Histogram,
    /// Sessions lost, by reason.
    pub lost: IntCounterVec,
}

impl Default for LinkMetrics {
    fn default() -> Self {
        let valid = "names and labels are valid";
        Self {
            links: IntGauge::new("culvert_links", "Resumable links that exist").expect(valid),
            attached: IntGauge::new("culvert_links_attached", "Resumable links that have a carrier").expect(valid),
            resumes: IntCounterVec::new(
                Opts::new("culvert_link_resumes_total", "Links resumed on a new carrier, by what ended the old one"),
                &["reason"],
            )
            .expect(valid),
            detached_seconds: Counter::new("culvert_link_detached_seconds_total", "Seconds without a carrier")
                .expect(valid),
            replay_bytes: IntGauge::new("culvert_link_replay_bytes", "Bytes held until the other side consumed them")
                .expect(valid),
            replayed_bytes: Counter::new("culvert_link_replayed_bytes_total", "Bytes sent again after resumes")
                .expect(valid),
            stall_seconds: Histogram::with_opts(
                HistogramOpts::new("culvert_link_stall_seconds", "Time from the loss of a carrier to the next one")
                    .buckets(STALL_BUCKETS.to_vec()),
            )
            .expect(valid),
            lost: IntCounterVec::new(
                Opts::new("culvert_link_sessions_lost_total", "Links that ended without their streams' end, by reason"),
                &["reason"],
            )
            .expect(valid),
        }
    }
}

impl LinkMetrics {
    /// Adds the metrics to a registry.
    pub fn register(&self, registry: &Registry) -> Result<(), prometheus::Error> {
        registry.register(Box::new(self.clone()))
    }

    pub(super) fn resumed(&self, reason: &str, stall: Duration, again: u64) {
        self.resumes.with_label_values(&[reason]).inc();
        self.stall_seconds.observe(stall.as_secs_f64());
        self.detached_seconds.inc_by(stall.as_secs_f64());
        self.replayed_bytes.inc_by(again as f64);
    }

    fn collectors(&self) -> [&dyn Collector; 8] {
        [
            &self.links,
            &self.attached,
            &self.resumes,
            &self.detached_seconds,
            &self.replay_bytes,
            &self.replayed_bytes,
            &self.stall_seconds,
            &self.lost,
        ]
    }
}

impl Collector for LinkMetrics {
    fn desc(&self) -> Vec<&Desc> {
        self.collectors().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.collectors().into_iter().flat_map(Collector::collect).collect()
    }
}
