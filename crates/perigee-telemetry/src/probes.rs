//! The HTTP port of every process: /health for probes and /metrics for Prometheus. A router puts its API beside them.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::sync::watch;

use crate::Metrics;

/// Brings gauges up to date before they are read.
pub type Refresh = Arc<dyn Fn() + Send + Sync>;

#[derive(Clone)]
struct Probes {
    metrics: Metrics,
    serving: watch::Receiver<bool>,
    refresh: Refresh,
}

/// The routes of the HTTP port. /health is 200 while `serving` is true, else 503; `refresh` runs before /metrics is
/// written.
pub fn routes(metrics: Metrics, serving: watch::Receiver<bool>, refresh: Refresh) -> axum::Router {
    let probes = Probes { metrics, serving, refresh };
    axum::Router::new().route("/health", get(health)).route("/metrics", get(metrics_text)).with_state(probes)
}

async fn health(State(probes): State<Probes>) -> Response {
    if *probes.serving.borrow() {
        return (StatusCode::OK, "ok\n").into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, "not ready\n").into_response()
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

    #[tokio::test]
    async fn health_follows_the_signal_and_metrics_are_text() {
        let metrics = Metrics::default();
        let counter = metrics.counter(&PREEMPTIONS_TOTAL).expect("registered");
        let (serving, watched) = watch::channel(false);
        let probes = Probes { metrics, serving: watched, refresh: Arc::new(move || counter.inc()) };
        assert_eq!(health(State(probes.clone())).await.status(), StatusCode::SERVICE_UNAVAILABLE);
        serving.send_replace(true);
        assert_eq!(health(State(probes.clone())).await.status(), StatusCode::OK);
        let response = metrics_text(State(probes)).await;
        assert_eq!(response.headers()[header::CONTENT_TYPE], Metrics::content_type());
        let body = axum::body::to_bytes(response.into_body(), 1 << 16).await.expect("a body");
        assert!(String::from_utf8_lossy(&body).contains("perigee_preemptions_total 1"));
    }
}
