//! Whether this router should be sent requests: some replica takes them, and the router is not shutting down. Probes and
//! gRPC health show it; running requests do not depend on it.

use perigee_telemetry::Readiness;
use tokio::sync::watch;

/// No replica takes requests yet, or any more.
pub(crate) const WAITING: Readiness = Readiness::not_ready("waiting");
/// What runs may end.
const DRAINING: Readiness = Readiness::not_ready("draining");

/// Follows both signals until one of their senders is gone.
pub(crate) async fn follow(
    mut has_replicas: watch::Receiver<bool>,
    mut closing: watch::Receiver<bool>,
    ready: watch::Sender<Readiness>,
) {
    loop {
        let now = match (*closing.borrow_and_update(), *has_replicas.borrow_and_update()) {
            (true, _) => DRAINING,
            (false, true) => Readiness::READY,
            (false, false) => WAITING,
        };
        ready.send_if_modified(|current| std::mem::replace(current, now) != now);
        let changed = tokio::select! {
            changed = has_replicas.changed() => changed,
            changed = closing.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_router_is_ready_with_replicas_until_it_closes() {
        let (replicas, has_replicas) = watch::channel(false);
        let (close, closing) = watch::channel(false);
        let (sender, mut ready) = watch::channel(WAITING);
        let task = tokio::spawn(follow(has_replicas, closing, sender));
        replicas.send_replace(true);
        ready.wait_for(|ready| ready.is_ready).await.expect("it follows");
        close.send_replace(true);
        ready.wait_for(|ready| *ready == DRAINING).await.expect("it follows");
        drop(replicas);
        task.await.expect("it ends with its senders");
        assert!(!ready.borrow().is_ready);
    }
}
