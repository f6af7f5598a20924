//! Events on their way to routers: collected during a step, sent once after it with the load. A channel to a router never
//! blocks the loop; a router whose end is gone is reported so that its sessions can be ended.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedSender;

use crate::moves::Reported;
use crate::request::{EventBatch, Load, RouterId, SessionEvent};

/// A router without events gets the load at least this often: a little more than twice a second.
pub(crate) const LOAD_INTERVAL: Duration = Duration::from_millis(400);

#[derive(Debug)]
struct Stream {
    sender: UnboundedSender<EventBatch>,
    events: Vec<SessionEvent>,
    reports: Vec<Reported>,
    last_sent: Option<Instant>,
    /// When the router's lease ends, where it has told one.
    lease: Option<Instant>,
}

#[derive(Debug, Default)]
pub(crate) struct Outbox {
    streams: BTreeMap<RouterId, Stream>,
}

impl Outbox {
    /// A router's events leave by `sender` from now on; it gets the load with the next flush.
    pub(crate) fn attach(&mut self, router: RouterId, sender: UnboundedSender<EventBatch>) {
        let (events, reports) =
            self.streams.remove(&router).map(|stream| (stream.events, stream.reports)).unwrap_or_default();
        self.streams.insert(router, Stream { sender, events, reports, last_sent: None, lease: None });
    }

    pub(crate) fn detach(&mut self, router: RouterId) {
        self.streams.remove(&router);
    }

    /// A router's lease ends then.
    pub(crate) fn renew(&mut self, router: RouterId, until: Instant) {
        if let Some(stream) = self.streams.get_mut(&router) {
            stream.lease = Some(until);
        }
    }

    /// Routers whose lease is over.
    pub(crate) fn lapsed(&self, now: Instant) -> Vec<RouterId> {
        let over = |stream: &Stream| stream.lease.is_some_and(|until| until <= now);
        self.streams.iter().filter(|(_, stream)| over(stream)).map(|(&router, _)| router).collect()
    }

    pub(crate) fn is_attached(&self, router: RouterId) -> bool {
        self.streams.contains_key(&router)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.streams.is_empty()
    }

    /// Keeps an event for the next flush; without effect for a router that is not attached.
    pub(crate) fn push(&mut self, router: RouterId, event: SessionEvent) {
        if let Some(stream) = self.streams.get_mut(&router) {
            stream.events.push(event);
        }
    }

    /// Keeps a report for the next flush, behind the events kept so far.
    pub(crate) fn report(&mut self, router: RouterId, mut report: Reported) {
        if let Some(stream) = self.streams.get_mut(&router) {
            report.before = stream.events.len();
            stream.reports.push(report);
        }
    }

    /// Sends every router its events, and the load alone where that is due. Returns routers that are gone.
    pub(crate) fn flush(&mut self, now: Instant, load: Load) -> Vec<RouterId> {
        let mut gone = Vec::new();
        for (router, stream) in &mut self.streams {
            let is_due = stream.last_sent.is_none_or(|sent| now.saturating_duration_since(sent) >= LOAD_INTERVAL);
            if stream.events.is_empty() && stream.reports.is_empty() && !is_due {
                if stream.sender.is_closed() {
                    gone.push(*router);
                }
                continue;
            }
            stream.last_sent = Some(now);
            let (events, reports) = (std::mem::take(&mut stream.events), std::mem::take(&mut stream.reports));
            let batch = EventBatch { events, reports, load };
            if stream.sender.send(batch).is_err() {
                gone.push(*router);
            }
        }
        gone
    }
}
