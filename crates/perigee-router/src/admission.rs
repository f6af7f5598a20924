//! The way in: how many requests run at once, and by when a client wants its answer. A request that cannot be answered
//! in time is refused at the door with a hint when to come back, instead of taking a slot from one that can.

use std::{sync::Arc, time::Duration};

use perigee_proto::status::WireError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tonic::metadata::MetadataMap;

use crate::error;

/// Counts the requests of this router.
#[derive(Debug, Clone)]
pub(crate) struct Admission {
    places: Arc<Semaphore>,
    limit: usize,
}

/// A request's place; it is free again when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    _permit: OwnedSemaphorePermit,
}

impl Admission {
    pub(crate) fn new(limit: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(limit)), limit }
    }

    /// Takes a place, or refuses at once.
    pub(crate) fn enter(&self) -> Result<Place, WireError> {
        match self.places.clone().try_acquire_owned() {
            Ok(permit) => Ok(Place { _permit: permit }),
            Err(_) => Err(error::router_full(self.limit)),
        }
    }
}

/// Refuses a request that would wait in a replica's queue beyond its deadline. `expected_ms` is a guess, so it only counts
/// where somebody waits already.
pub(crate) fn check_wait(expected_ms: f64, queue_is_empty: bool, deadline: Option<Instant>) -> Result<(), WireError> {
    let Some(deadline) = deadline else { return Ok(()) };
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(error::deadline_exceeded());
    }
    if queue_is_empty || expected_ms <= left.as_secs_f64() * 1000.0 {
        return Ok(());
    }
    let message = format!("the first token is expected in {expected_ms:.0} ms, after the deadline in {left:?}");
    Err(WireError::exhausted(message, retry_hint(expected_ms)))
}

/// When to try again, where a queue of `expected_ms` must drain first.
pub(crate) fn retry_hint(expected_ms: f64) -> Duration {
    Duration::from_millis(expected_ms.clamp(100.0, 30_000.0) as u64)
}

/// The deadline that the client gave with the call, counted from now.
///
/// # Errors
/// INVALID_ARGUMENT for a grpc-timeout that does not follow gRPC's rule: up to 8 digits and a unit.
pub(crate) fn deadline(metadata: &MetadataMap) -> Result<Option<Instant>, WireError> {
    let Some(value) = metadata.get("grpc-timeout") else { return Ok(None) };
    let invalid = || WireError::invalid("grpc-timeout", "it must be up to 8 digits and one of H, M, S, m, u, n");
    let timeout = value.to_str().ok().and_then(parse_timeout).ok_or_else(invalid)?;
    // Clients bound the call by the same time, and know less of why; be a little earlier.
    Ok(Some(Instant::now() + timeout.saturating_sub(Duration::from_millis(5))))
}

/// A time as gRPC's header has it: digits and a unit.
pub(crate) fn parse_timeout(text: &str) -> Option<Duration> {
    let unit = text.chars().last()?;
    let digits = text.strip_suffix(unit)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        'H' => Some(Duration::from_secs(count * 3600)),
        'M' => Some(Duration::from_secs(count * 60)),
        'S' => Some(Duration::from_secs(count)),
        'm' => Some(Duration::from_millis(count)),
        'u' => Some(Duration::from_micros(count)),
        'n' => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use perigee_proto::status::ErrorKind;

    use super::*;

    #[test]
    fn places_are_counted_and_come_back() {
        let admission = Admission::new(2);
        let first = admission.enter().expect("a place");
        let _second = admission.enter().expect("a place");
        let refused = admission.enter().expect_err("full");
        assert_eq!(refused.kind, ErrorKind::ResourceExhausted);
        assert!(refused.retry_after.is_some());
        drop(first);
        assert!(admission.enter().is_ok());
    }

    #[test]
    fn timeouts_follow_the_rule_of_grpc() {
        assert_eq!(parse_timeout("2S"), Some(Duration::from_secs(2)));
        assert_eq!(parse_timeout("150m"), Some(Duration::from_millis(150)));
        assert_eq!(parse_timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(parse_timeout("7u"), Some(Duration::from_micros(7)));
        for bad in ["", "S", "5", "123456789S", "-1S", "1.5S", "5 S", "5x", "5é"] {
            assert_eq!(parse_timeout(bad), None, "{bad:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_queue_that_outlasts_the_deadline_refuses() {
        let soon = Some(Instant::now() + Duration::from_millis(100));
        assert!(check_wait(1e9, false, None).is_ok());
        assert!(check_wait(50.0, false, soon).is_ok());
        assert!(check_wait(1e9, true, soon).is_ok(), "an idle replica is always tried");
        let refused = check_wait(500.0, false, soon).expect_err("too long");
        assert_eq!(
            (refused.kind, refused.retry_after),
            (ErrorKind::ResourceExhausted, Some(Duration::from_millis(500)))
        );
        tokio::time::advance(Duration::from_millis(100)).await;
        assert_eq!(check_wait(1.0, true, soon).expect_err("passed").kind, ErrorKind::DeadlineExceeded);
    }
}
