//! How long a replica may step a router's sessions: a lease that the router grants, counted from a moment on this
//! replica's own clock. Every batch carries that clock, a renewal repeats the newest one that the router has read, and the
//! lease runs from then. A renewal that waited in a buffer, while this process or the network stood still, so grants
//! nothing for the time that it waited; and whoever has not heard from this replica for a whole lease knows that it is
//! over here too.

use std::time::Duration;

use tokio::time::Instant;

/// One router's lease.
#[derive(Debug)]
pub(crate) struct Lease {
    /// When this replica's clock for the stream stood at 1; 0 is nobody's reading.
    started: Instant,
    length: Duration,
    until: Instant,
}

impl Lease {
    /// A lease from now on: its router has just said hello.
    pub(crate) fn new(length: Duration, now: Instant) -> Self {
        Self { started: now, length, until: now + length }
    }

    /// The clock, in milliseconds, for a batch that is sent now.
    pub(crate) fn clock(&self, now: Instant) -> u64 {
        1 + now.saturating_duration_since(self.started).as_millis() as u64
    }

    /// The router has read the batch with this clock. Clocks of the future and old ones change nothing.
    pub(crate) fn renew(&mut self, clock: u64, now: Instant) {
        if clock == 0 || clock > self.clock(now) {
            return;
        }
        self.until = self.until.max(self.started + Duration::from_millis(clock - 1) + self.length);
    }

    /// When it ends.
    pub(crate) fn until(&self) -> Instant {
        self.until
    }

    /// How often the router must hear from this replica to be able to renew in time.
    pub(crate) fn tell_every(&self) -> Duration {
        self.length / 8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH: Duration = Duration::from_secs(2);

    fn after(start: Instant, milliseconds: u64) -> Instant {
        start + Duration::from_millis(milliseconds)
    }

    #[test]
    fn a_lease_runs_from_what_the_router_has_read_and_not_from_when_its_word_is_read_here() {
        let start = Instant::now();
        let mut lease = Lease::new(LENGTH, start);
        assert_eq!(lease.until(), after(start, 2000));
        let clock = lease.clock(after(start, 500));
        // Read ten seconds later: this process was stopped in between.
        lease.renew(clock, after(start, 10_500));
        assert_eq!(lease.until(), after(start, 2500));
        lease.renew(lease.clock(after(start, 400)), after(start, 10_500));
        assert_eq!(lease.until(), after(start, 2500), "an older word takes nothing back");
    }

    #[test]
    fn words_that_no_batch_of_this_replica_carried_grant_nothing() {
        let start = Instant::now();
        let mut lease = Lease::new(LENGTH, start);
        for clock in [0, 502, u64::MAX] {
            lease.renew(clock, after(start, 500));
            assert_eq!(lease.until(), after(start, 2000), "{clock}");
        }
    }
}
