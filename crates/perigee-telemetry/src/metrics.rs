//! Every metric's name, help and labels, in one table that dashboards and a test read too; and a registry that only
//! gives out metrics of that table. Each process registers those that it measures.

use prometheus::{Encoder, HistogramOpts, Opts, TextEncoder};
pub use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

/// What a metric is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MetricKind {
    /// Only rises.
    Counter,
    /// Rises and falls.
    Gauge,
    /// Counts observations by upper bounds.
    Histogram(&'static [f64]),
}

/// One metric: its name on the wire is its name everywhere.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// Name.
    pub name: &'static str,
    /// What it says, with its unit.
    pub help: &'static str,
    /// What it is.
    pub kind: MetricKind,
    /// Label, if it has one, and the values that are present from the start.
    pub labels: &'static [(&'static str, &'static [&'static str])],
}

/// Seconds from a request's arrival on, up to minutes.
const REQUEST_SECONDS: &[f64] =
    &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];
/// Seconds of a step or a token.
const STEP_SECONDS: &[f64] =
    &[0.0005, 0.001, 0.002, 0.004, 0.008, 0.012, 0.016, 0.024, 0.032, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0];
/// Seconds of work that waits for nothing.
const PLACEMENT_BOUNDS: &[f64] = &[1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3];

const fn plain(name: &'static str, kind: MetricKind, help: &'static str) -> Metric {
    Metric { name, help, kind, labels: &[] }
}

/// Time from a request's arrival to its first token.
pub const TTFT_SECONDS: Metric = plain(
    "perigee_ttft_seconds",
    MetricKind::Histogram(REQUEST_SECONDS),
    "Time from a request's arrival at the router to its first token, in seconds.",
);
/// Time of a choice of replica.
pub const PLACEMENT_SECONDS: Metric = plain(
    "perigee_placement_seconds",
    MetricKind::Histogram(PLACEMENT_BOUNDS),
    "Time in which the router chose a replica for a request, in seconds.",
);
/// Time between tokens of a choice.
pub const TPOT_SECONDS: Metric = plain(
    "perigee_tpot_seconds",
    MetricKind::Histogram(STEP_SECONDS),
    "Mean time of a choice's output tokens after the first, in seconds.",
);
/// Time in a queue.
pub const QUEUE_SECONDS: Metric = plain(
    "perigee_queue_seconds",
    MetricKind::Histogram(REQUEST_SECONDS),
    "Time from a request's arrival at the replica to its first step, in seconds.",
);
/// Time of a step.
pub const STEP_SECONDS_BY_PHASE: Metric = Metric {
    name: "perigee_step_seconds",
    help: "Time of a step, in seconds, by what it held: decode rows, prefill chunks, or both.",
    kind: MetricKind::Histogram(STEP_SECONDS),
    labels: &[("phase", &["decode", "prefill", "mixed"])],
};
/// Running requests.
pub const REQUESTS_RUNNING: Metric = plain(
    "perigee_requests_running",
    MetricKind::Gauge,
    "Requests with a first token on a router, sessions in the batch of a replica.",
);
/// Waiting requests.
pub const REQUESTS_WAITING: Metric = plain(
    "perigee_requests_waiting",
    MetricKind::Gauge,
    "Requests without a first token on a router, sessions outside the batch on a replica.",
);
/// Tokens.
pub const TOKENS_TOTAL: Metric = Metric {
    name: "perigee_tokens_total",
    help: "Tokens: of prompts, and generated.",
    kind: MetricKind::Counter,
    labels: &[("kind", &["prompt", "completion"])],
};
/// State slots.
pub const STATE_SLOTS: Metric = Metric {
    name: "perigee_state_slots",
    help: "State slots of the replica: free, and all.",
    kind: MetricKind::Gauge,
    labels: &[("kind", &["free", "total"])],
};
/// Latent pages.
pub const LATENT_PAGES: Metric = Metric {
    name: "perigee_latent_pages",
    help: "Latent pages of the replica: free, and all.",
    kind: MetricKind::Gauge,
    labels: &[("kind", &["free", "total"])],
};
/// Preemptions.
pub const PREEMPTIONS_TOTAL: Metric = plain(
    "perigee_preemptions_total",
    MetricKind::Counter,
    "Sessions that left the batch before their end because slots or pages ran out.",
);
/// Migrations.
pub const MIGRATIONS_TOTAL: Metric = Metric {
    name: "perigee_migrations_total",
    help: "Moves of running sessions, by what moved and how it ended.",
    kind: MetricKind::Counter,
    labels: &[("mode", &["split", "whole", "replay", "takeover"]), ("result", &["done", "aborted", "failed"])],
};
/// Stall of a migration.
pub const MIGRATION_STALL_SECONDS: Metric = plain(
    "perigee_migration_stall_seconds",
    MetricKind::Histogram(STEP_SECONDS),
    "Time between a moved session's last token before and its first after the move, in seconds.",
);
/// Bytes of migrations.
pub const MIGRATION_BYTES_TOTAL: Metric = Metric {
    name: "perigee_migration_bytes_total",
    help: "Bytes that sessions moved: state with tails and partial page, full pages, token ids, attention asked, pages followed.",
    kind: MetricKind::Counter,
    labels: &[("kind", &["state", "page", "token", "attention", "followed"])],
};
/// Bytes of moved states by way.
pub const MIGRATION_STATE_BYTES_TOTAL: Metric = Metric {
    name: "perigee_migration_state_bytes_total",
    help: "Bytes of moved states and tails by the way that they took: slot to slot, pairs of ranks, the stream.",
    kind: MetricKind::Counter,
    labels: &[("way", &["ipc", "pair", "grpc"])],
};
/// Remote attention.
pub const REMOTE_ATTENTION_SECONDS: Metric = plain(
    "perigee_remote_attention_seconds",
    MetricKind::Histogram(STEP_SECONDS),
    "Time from an attention query to another replica to its answer, in seconds.",
);
/// Prefix cache.
pub const PREFIX_TOKENS_TOTAL: Metric = Metric {
    name: "perigee_prefix_tokens_total",
    help: "Prompt tokens that were looked up in the prefix cache, by whether they were there.",
    kind: MetricKind::Counter,
    labels: &[("result", &["hit", "miss"])],
};

/// Every metric.
pub const ALL: [Metric; 17] = [
    PLACEMENT_SECONDS,
    TTFT_SECONDS,
    TPOT_SECONDS,
    QUEUE_SECONDS,
    STEP_SECONDS_BY_PHASE,
    REQUESTS_RUNNING,
    REQUESTS_WAITING,
    TOKENS_TOTAL,
    STATE_SLOTS,
    LATENT_PAGES,
    PREEMPTIONS_TOTAL,
    MIGRATIONS_TOTAL,
    MIGRATION_STALL_SECONDS,
    MIGRATION_BYTES_TOTAL,
    MIGRATION_STATE_BYTES_TOTAL,
    REMOTE_ATTENTION_SECONDS,
    PREFIX_TOKENS_TOTAL,
];

/// A metric that cannot be registered or written.
#[derive(Debug, thiserror::Error)]
#[error("metric {name}: {reason}")]
pub struct MetricsError {
    /// The metric.
    pub name: String,
    /// What the library said.
    pub reason: String,
}

/// The metrics of one process or one embedded part of it. Clones share their content.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    registry: prometheus::Registry,
}

macro_rules! register {
    ($(#[$doc:meta])* $function:ident -> $collector:ty) => {
        $(#[$doc])*
        ///
        /// # Errors
        /// [`MetricsError`] where it is registered already.
        pub fn $function(&self, metric: &Metric) -> Result<$collector, MetricsError> {
            let failed = |error: prometheus::Error| MetricsError {
                name: metric.name.to_owned(),
                reason: error.to_string(),
            };
            let collector = <$collector as Build>::build(metric).map_err(failed)?;
            self.registry.register(Box::new(collector.clone())).map_err(failed)?;
            Ok(collector)
        }
    };
}

impl Metrics {
    register! {
        /// A counter without labels.
        counter -> IntCounter
    }
    register! {
        /// A counter with labels, those of the table at zero.
        counters -> IntCounterVec
    }
    register! {
        /// A gauge without labels.
        gauge -> IntGauge
    }
    register! {
        /// A gauge with labels, those of the table at zero.
        gauges -> IntGaugeVec
    }
    register! {
        /// A histogram without labels.
        histogram -> Histogram
    }
    register! {
        /// A histogram with labels, those of the table empty.
        histograms -> HistogramVec
    }

    /// Everything in the text format that Prometheus reads.
    ///
    /// # Errors
    /// [`MetricsError`] where a metric cannot be written; none of this table is known to do that.
    pub fn text(&self) -> Result<String, MetricsError> {
        let failed = |reason: String| MetricsError { name: "/metrics".to_owned(), reason };
        let mut bytes = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut bytes).map_err(|error| failed(error.to_string()))?;
        String::from_utf8(bytes).map_err(|error| failed(error.to_string()))
    }

    /// The content type of [`Metrics::text`].
    pub fn content_type() -> &'static str {
        prometheus::TEXT_FORMAT
    }
}

/// How a collector comes out of its row in the table.
trait Build: prometheus::core::Collector + Clone + Sized {
    fn build(metric: &Metric) -> prometheus::Result<Self>;
}

fn options(metric: &Metric) -> Opts {
    Opts::new(metric.name, metric.help)
}

fn histogram_options(metric: &Metric) -> HistogramOpts {
    let buckets = match metric.kind {
        MetricKind::Histogram(bounds) => bounds,
        MetricKind::Counter | MetricKind::Gauge => &[],
    };
    HistogramOpts::from(options(metric)).buckets(buckets.to_vec())
}

fn label_names(metric: &Metric) -> Vec<&'static str> {
    metric.labels.iter().map(|(name, _)| *name).collect()
}

/// Every combination of the labels' values.
fn label_values(metric: &Metric) -> Vec<Vec<&'static str>> {
    metric.labels.iter().fold(vec![Vec::new()], |rows, (_, values)| {
        rows.iter().flat_map(|row| values.iter().map(|value| [row.as_slice(), &[*value]].concat())).collect()
    })
}

impl Build for IntCounter {
    fn build(metric: &Metric) -> prometheus::Result<Self> {
        Self::with_opts(options(metric))
    }
}

impl Build for IntGauge {
    fn build(metric: &Metric) -> prometheus::Result<Self> {
        Self::with_opts(options(metric))
    }
}

impl Build for Histogram {
    fn build(metric: &Metric) -> prometheus::Result<Self> {
        Self::with_opts(histogram_options(metric))
    }
}

impl Build for IntCounterVec {
    fn build(metric: &Metric) -> prometheus::Result<Self> {
        let collector = Self::new(options(metric), &label_names(metric))?;
        for values in label_values(metric) {
            collector.get_metric_with_label_values(&values)?;
        }
        Ok(collector)
    }
}

impl Build for IntGaugeVec {
    fn build(metric: &Metric) -> prometheus::Result<Self> {
        let collector = Self::new(options(metric), &label_names(metric))?;
        for values in label_values(metric) {
            collector.get_metric_with_label_values(&values)?;
        }
        Ok(collector)
    }
}

impl Build for HistogramVec {
    fn build(metric: &Metric) -> prometheus::Result<Self> {
        let collector = Self::new(histogram_options(metric), &label_names(metric))?;
        for values in label_values(metric) {
            collector.get_metric_with_label_values(&values)?;
        }
        Ok(collector)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// What users were promised; see the metrics part of the interface description.
    const PROMISED: &str =
        "perigee_placement_seconds, perigee_ttft_seconds, perigee_tpot_seconds, perigee_queue_seconds,
        perigee_step_seconds{phase}, perigee_requests_running, perigee_requests_waiting, perigee_tokens_total{kind},
        perigee_state_slots{kind}, perigee_latent_pages{kind}, perigee_preemptions_total,
        perigee_migrations_total{mode,result}, perigee_migration_stall_seconds, perigee_migration_bytes_total{kind},
        perigee_migration_state_bytes_total{way}, perigee_remote_attention_seconds, perigee_prefix_tokens_total{result}";

    #[test]
    fn the_table_holds_what_was_promised() {
        let ours: BTreeSet<String> = ALL
            .iter()
            .map(|metric| match label_names(metric).join(",") {
                names if names.is_empty() => metric.name.to_owned(),
                names => format!("{}{{{names}}}", metric.name),
            })
            .collect();
        // Commas inside braces separate labels, not metrics.
        let mut depth = 0;
        let promised: BTreeSet<String> = PROMISED
            .split(|character| {
                depth += i32::from(character == '{') - i32::from(character == '}');
                character == ',' && depth == 0
            })
            .map(|name| name.trim().to_owned())
            .collect();
        assert_eq!(ours, promised);
    }

    #[test]
    fn all_metrics_are_written_before_anything_is_measured() {
        let metrics = Metrics::default();
        for metric in &ALL {
            let registered = match (metric.kind, metric.labels.is_empty()) {
                (MetricKind::Counter, true) => metrics.counter(metric).map(drop),
                (MetricKind::Counter, false) => metrics.counters(metric).map(drop),
                (MetricKind::Gauge, true) => metrics.gauge(metric).map(drop),
                (MetricKind::Gauge, false) => metrics.gauges(metric).map(drop),
                (MetricKind::Histogram(_), true) => metrics.histogram(metric).map(drop),
                (MetricKind::Histogram(_), false) => metrics.histograms(metric).map(drop),
            };
            registered.expect(metric.name);
        }
        let text = metrics.text().expect("written");
        for metric in &ALL {
            assert!(text.contains(&format!("# HELP {} {}", metric.name, metric.help)), "{} is missing", metric.name);
        }
        assert!(text.contains("perigee_migrations_total{mode=\"split\",result=\"failed\"} 0"), "{text}");
        let again = metrics.counter(&PREEMPTIONS_TOTAL).expect_err("registered already");
        assert_eq!(again.name, PREEMPTIONS_TOTAL.name);
    }
}
