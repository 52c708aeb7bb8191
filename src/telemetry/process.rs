//! The process seen from outside: memory, descriptors, threads, processor time.
//!
//! Owns the reading of `/proc/self` into the `process_*` metrics that Prometheus users know. Does not know
//! culvert. Invariant: a file that cannot be read leaves its metric as it was; a scrape never fails for it.

use std::{fs, sync::Mutex};

use prometheus::{
    Counter, Gauge, IntGauge,
    core::{Collector, Desc},
    proto::MetricFamily,
};

/// Clock ticks per second in `/proc/*/stat`. The kernel's user-visible unit is 100 on every architecture that
/// Linux still supports in user space, whatever CONFIG_HZ says.
const TICKS_PER_SECOND: f64 = 100.0;
/// Bytes per page in `/proc/self/statm` are not portable, so sizes are read from `status`, in KiB.
const KIB: i64 = 1024;

pub(super) struct ProcessCollector {
    /// A counter can only be added to; the lock keeps two scrapes from adding the same seconds twice.
    cpu: Mutex<Counter>,
    cpu_desc: Vec<Desc>,
    open_fds: IntGauge,
    max_fds: IntGauge,
    resident: IntGauge,
    virtual_memory: IntGauge,
    threads: IntGauge,
    start_time: Gauge,
}

impl ProcessCollector {
    pub(super) fn new() -> Result<Self, prometheus::Error> {
        let cpu = Counter::new("process_cpu_seconds_total", "User and system processor time in seconds.")?;
        let start_time = Gauge::new("process_start_time_seconds", "When the process started, seconds since 1970.")?;
        start_time.set(start_of_process().unwrap_or_default());
        Ok(Self {
            cpu_desc: cpu.desc().into_iter().cloned().collect(),
            cpu: Mutex::new(cpu),
            open_fds: IntGauge::new("process_open_fds", "Open file descriptors.")?,
            max_fds: IntGauge::new("process_max_fds", "The limit on open file descriptors.")?,
            resident: IntGauge::new("process_resident_memory_bytes", "Resident memory in bytes.")?,
            virtual_memory: IntGauge::new("process_virtual_memory_bytes", "Virtual memory in bytes.")?,
            threads: IntGauge::new("process_threads", "Threads of the process.")?,
            start_time,
        })
    }

    fn gauges(&self) -> [&IntGauge; 5] {
        [&self.open_fds, &self.max_fds, &self.resident, &self.virtual_memory, &self.threads]
    }

    fn refresh(&self) {
        if let Ok(entries) = fs::read_dir("/proc/self/fd") {
            // The listing itself holds one descriptor.
            self.open_fds.set(i64::try_from(entries.count()).unwrap_or(i64::MAX) - 1);
        }
        if let Ok(limits) = fs::read_to_string("/proc/self/limits")
            && let Some(limit) = number_after(&limits, "Max open files")
        {
            self.max_fds.set(limit);
        }
        let Ok(status) = fs::read_to_string("/proc/self/status") else { return };
        for (gauge, key, unit) in
            [(&self.resident, "VmRSS:", KIB), (&self.virtual_memory, "VmSize:", KIB), (&self.threads, "Threads:", 1)]
        {
            if let Some(value) = number_after(&status, key) {
                gauge.set(value * unit);
            }
        }
    }

    fn collect_cpu(&self) -> Vec<MetricFamily> {
        let cpu = self.cpu.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some([_, user, system]) = stat_fields() {
            let seconds = (user + system) / TICKS_PER_SECOND;
            cpu.inc_by((seconds - cpu.get()).max(0.0));
        }
        cpu.collect()
    }
}

impl Collector for ProcessCollector {
    fn desc(&self) -> Vec<&Desc> {
        let gauges = self.gauges().into_iter().flat_map(Collector::desc);
        gauges.chain(self.cpu_desc.iter()).chain(self.start_time.desc()).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.refresh();
        let mut families: Vec<_> = self.gauges().into_iter().flat_map(Collector::collect).collect();
        families.extend(self.collect_cpu());
        families.extend(self.start_time.collect());
        families
    }
}

/// The first number behind `key` at the start of a line.
fn number_after(text: &str, key: &str) -> Option<i64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(key))?;
    rest.split_whitespace().next()?.parse().ok()
}

fn start_of_process() -> Option<f64> {
    let boot = number_after(&fs::read_to_string("/proc/stat").ok()?, "btime ")?;
    let [start, ..] = stat_fields()?;
    Some(boot as f64 + start / TICKS_PER_SECOND)
}

/// Start time, user time and system time in ticks.
fn stat_fields() -> Option<[f64; 3]> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The program's name stands in parentheses and may hold anything; what follows it is field 3.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse().ok();
    Some([field(22)?, field(14)?, field(15)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_plausible_numbers() {
        let collector = ProcessCollector::new().unwrap();
        collector.refresh();
        assert!(collector.open_fds.get() >= 3);
        assert!(collector.max_fds.get() >= collector.open_fds.get());
        assert!(collector.resident.get() > 1 << 20);
        assert!(collector.threads.get() >= 1);
        assert!(collector.start_time.get() > 1.5e9);
        assert_eq!(collector.collect().len(), collector.desc().len());
    }
}
