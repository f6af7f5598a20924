//! The HTTP port of every process: /live and /health for probes, /metrics for Prometheus. A router puts its API beside
//! them.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::sync::watch;

use crate::Metrics;

/// Brings gauges up to date before they are read.
pub type Refresh = Arc<dyn Fn() + Send + Sync>;

/// Where a process is between its start and its end, and whether it is to be sent work there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Readiness {
    /// In a word: forming, loading, warming, ready, draining or gone for a rank; waiting, ready or draining for a router.
    pub state: &'static str,
    /// Whether it takes work.
    pub is_ready: bool,
}

impl Readiness {
    /// It takes work.
    pub const READY: Self = Self { state: "ready", is_ready: true };

    /// It takes none, because it is in `state`.
    pub const fn not_ready(state: &'static str) -> Self {
        Self { state, is_ready: false }
    }
}

#[derive(Clone)]
struct Probes {
    metrics: Metrics,
    readiness: watch::Receiver<Readiness>,
    refresh: Refresh,
}

/// The routes of the HTTP port. /live is always 200; /health is 200 while the process is ready, else 503 with its state;
/// `refresh` runs before /metrics is written.
pub fn routes(metrics: Metrics, readiness: watch::Receiver<Readiness>, refresh: Refresh) -> axum::Router {
    let probes = Probes { metrics, readiness, refresh };
    axum::Router::new()
        .route("/live", get(live))
        .route("/health", get(health))
        .route("/metrics", get(metrics_text))
        .with_state(probes)
}

async fn live() -> &'static str {
    "ok\n"
}

async fn health(State(probes): State<Probes>) -> Response {
    let Readiness { state, is_ready } = *probes.readiness.borrow();
    if is_ready {
        return (StatusCode::OK, "ok\n").into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, format!("{state}\n")).into_response()
}

async fn metrics_text(State(probes): State<Probes>) -> Response {
    (probes.refresh)();
    match probes.metrics.text() {
        Ok(text) => ([(header::CONTENT_TYPE, Metrics::content_type())], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::PREEMPTIONS_TOTAL;

    async fn body(response: Response) -> String {
        let bytes = axum::body::to_bytes(response.into_body(), 1 << 16).await.expect("a body");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    #[tokio::test]
    async fn health_names_the_state_and_metrics_are_text() {
        let metrics = Metrics::default();
        let counter = metrics.counter(&PREEMPTIONS_TOTAL).expect("registered");
        let (sender, readiness) = watch::channel(Readiness::not_ready("forming"));
        let probes = Probes { metrics, readiness, refresh: Arc::new(move || counter.inc()) };
        for state in ["forming", "draining"] {
            sender.send_replace(Readiness::not_ready(state));
            let answer = health(State(probes.clone())).await;
            assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
            assert_eq!(body(answer).await, format!("{state}\n"));
        }
        sender.send_replace(Readiness::READY);
        assert_eq!(health(State(probes.clone())).await.status(), StatusCode::OK);
        let response = metrics_text(State(probes)).await;
        assert_eq!(response.headers()[header::CONTENT_TYPE], Metrics::content_type());
        assert!(body(response).await.contains("perigee_preemptions_total 1"));
    }
}
