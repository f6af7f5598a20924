//! What a leader measures of its way to other replicas: how long a short question takes, and how fast much arrives. It
//! sends nothing of its own: whoever carries handoffs, pages, questions and words to homes notes here what they took.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use perigee_proto::internal::Link;

/// Share of a new measurement in what is kept; the rest is the past.
const NEW: f64 = 0.2;
/// Fewer bytes than these say nothing about a rate: they take as long as the question whether they came.
const LEAST_BYTES: u64 = 256 << 10;
/// A shorter time is one that the clock did not see.
const LEAST_TIME: Duration = Duration::from_micros(50);
/// Replicas of which something is kept; the one that was not heard of for longest is forgotten then.
const MOST: usize = 256;

/// Measurements of one leader. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Links(Arc<Mutex<Measured>>);

#[derive(Debug, Default)]
struct Measured {
    by_replica: BTreeMap<String, Way>,
    /// Number of measurements so far.
    count: u64,
}

#[derive(Debug, Default)]
struct Way {
    round_trip_us: Option<f64>,
    bytes_per_second: Option<f64>,
    /// Number of the last measurement.
    last: u64,
}

impl Links {
    /// A short question was answered in that time.
    pub fn answered(&self, replica: &str, time: Duration) {
        if time >= LEAST_TIME {
            self.note(replica, |way| &mut way.round_trip_us, time.as_secs_f64() * 1e6);
        }
    }

    /// So many bytes crossed, and were written where they belong, in that time.
    pub fn carried(&self, replica: &str, bytes: u64, time: Duration) {
        if bytes >= LEAST_BYTES && time >= LEAST_TIME {
            self.note(replica, |way| &mut way.bytes_per_second, bytes as f64 / time.as_secs_f64());
        }
    }

    /// How many measurements there were: whoever told them all need not tell them again before it changes.
    pub fn count(&self) -> u64 {
        self.0.lock().count
    }

    /// Everything that is known.
    pub fn told(&self) -> Vec<Link> {
        let measured = self.0.lock();
        let link = |(replica, way): (&String, &Way)| Link {
            replica: replica.clone(),
            round_trip_us: way.round_trip_us.map_or(0, |time| (time as u32).max(1)),
            bytes_per_second: way.bytes_per_second.map_or(0, |rate| (rate as u64).max(1)),
        };
        measured.by_replica.iter().map(link).collect()
    }

    fn note(&self, replica: &str, which: impl Fn(&mut Way) -> &mut Option<f64>, found: f64) {
        let mut measured = self.0.lock();
        measured.count += 1;
        let count = measured.count;
        let known = &mut measured.by_replica;
        if known.len() >= MOST && !known.contains_key(replica) {
            let oldest = known.iter().min_by_key(|(_, way)| way.last).map(|(replica, _)| replica.clone());
            oldest.and_then(|oldest| known.remove(&oldest));
        }
        let way = known.entry(replica.to_owned()).or_default();
        way.last = count;
        let kept = which(way);
        *kept = Some(kept.map_or(found, |was| was + NEW * (found - was)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLISECOND: Duration = Duration::from_millis(1);

    fn link(links: &Links, replica: &str) -> (u32, u64) {
        let told = links.told().into_iter().find(|link| link.replica == replica);
        told.map_or((0, 0), |link| (link.round_trip_us, link.bytes_per_second))
    }

    #[test]
    fn times_and_rates_are_smoothed_for_each_replica() {
        let links = Links::default();
        assert_eq!((links.count(), links.told().len()), (0, 0));
        links.answered("b", MILLISECOND);
        links.carried("b", 10_000_000, 10 * MILLISECOND);
        links.clone().answered("c", 3 * MILLISECOND);
        assert_eq!((link(&links, "b"), link(&links, "c")), ((1000, 1_000_000_000), (3000, 0)));
        links.answered("b", 2 * MILLISECOND);
        links.carried("b", 10_000_000, 20 * MILLISECOND);
        assert_eq!((link(&links, "b"), links.count()), ((1200, 900_000_000), 5));
    }

    #[test]
    fn what_is_too_small_to_be_measured_is_none() {
        let links = Links::default();
        links.carried("b", LEAST_BYTES - 1, MILLISECOND);
        links.carried("b", 1 << 30, Duration::ZERO);
        links.answered("b", Duration::ZERO);
        assert_eq!(links.count(), 0);
    }

    #[test]
    fn the_longest_unheard_of_is_forgotten() {
        let links = Links::default();
        for index in 0..MOST {
            links.answered(&format!("r{index}"), MILLISECOND);
        }
        links.answered("r0", MILLISECOND);
        links.answered("new", MILLISECOND);
        assert_eq!(links.told().len(), MOST);
        assert_eq!((link(&links, "r0").0, link(&links, "r1").0, link(&links, "new").0), (1000, 0, 1000));
    }
}
