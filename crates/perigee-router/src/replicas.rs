//! The set of replicas that this router knows: what the registry says of each, and its live stream if there is one. It
//! decides which model is served and which replica a request goes to, and keeps nothing about requests.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use perigee_proto::status::WireError;
use perigee_proto::v1;
use perigee_registry::{ReplicaRecord, ReplicaStatus};
use tokio::sync::watch;

use crate::attachment::Attachment;
use crate::board::{Board, Chosen};
use crate::error;
use crate::model::Model;
use crate::route::{self, Demand, Report};

/// All known replicas.
#[derive(Debug)]
pub(crate) struct Replicas {
    inner: Mutex<Inner>,
    serving: watch::Sender<bool>,
    ready: watch::Sender<usize>,
    draining: watch::Sender<bool>,
}

#[derive(Debug)]
struct Inner {
    known: BTreeMap<String, Known>,
    /// The only digest to route to, where the configuration names one.
    pinned: Option<String>,
    model: Option<Arc<Model>>,
    /// Streams to ready replicas of the model, by name: those that can be placed on if their last load allows it.
    ready: Vec<Arc<Attachment>>,
    /// Their reports, in the same order.
    board: Arc<Board>,
}

#[derive(Debug)]
struct Known {
    record: ReplicaRecord,
    attachment: Option<Arc<Attachment>>,
}

/// A replica for a request.
#[derive(Debug, Clone)]
pub(crate) struct Placement {
    pub(crate) attachment: Arc<Attachment>,
    pub(crate) report: Report,
    /// Milliseconds until the first token.
    pub(crate) expected_ms: f64,
}

/// A replica for a session that moves.
#[derive(Debug, Clone)]
pub(crate) struct MoveTarget {
    pub(crate) attachment: Arc<Attachment>,
    /// Address of its Replica service.
    pub(crate) endpoint: String,
    pub(crate) report: Report,
}

impl Replicas {
    pub(crate) fn new(pinned: Option<String>) -> Self {
        let inner = Inner { known: BTreeMap::new(), pinned, model: None, ready: Vec::new(), board: Arc::default() };
        let (serving, draining) = (watch::Sender::new(false), watch::Sender::new(false));
        Self { inner: Mutex::new(inner), serving, ready: watch::Sender::new(0), draining }
    }

    /// Whether a replica of the served model takes requests.
    pub(crate) fn serving(&self) -> watch::Receiver<bool> {
        self.serving.subscribe()
    }

    /// How many replicas take requests.
    pub(crate) fn ready(&self) -> watch::Receiver<usize> {
        self.ready.subscribe()
    }

    /// Whether sessions are to leave a replica.
    pub(crate) fn is_any_draining(&self) -> watch::Receiver<bool> {
        self.draining.subscribe()
    }

    /// Replicas that sessions are to leave, by their live streams.
    pub(crate) fn draining(&self) -> Vec<Arc<Attachment>> {
        self.inner.lock().draining().cloned().collect()
    }

    /// A replica said for the first time that it drains.
    pub(crate) fn reconsider(&self) {
        self.settle(self.inner.lock());
    }

    /// The served model, once a replica was attached.
    pub(crate) fn model(&self) -> Option<Arc<Model>> {
        self.inner.lock().model.clone()
    }

    /// The registry knows a replica, or knows it better.
    pub(crate) fn insert(&self, record: ReplicaRecord) {
        let mut inner = self.inner.lock();
        match inner.known.get_mut(&record.replica) {
            Some(known) => known.record = record,
            None => {
                inner.known.insert(record.replica.clone(), Known { record, attachment: None });
            }
        }
        self.settle(inner);
    }

    /// The registry lost a replica. While its stream lives it stays, for the sessions that run there.
    pub(crate) fn leave(&self, replica: &str) {
        let mut inner = self.inner.lock();
        match inner.known.get_mut(replica) {
            Some(known) if known.attachment.is_some() => known.record.status = ReplicaStatus::Gone,
            _ => drop(inner.known.remove(replica)),
        }
        self.settle(inner);
    }

    /// A stream to a replica is live.
    pub(crate) fn attach(&self, replica: &str, attachment: Arc<Attachment>) {
        let mut inner = self.inner.lock();
        if let Some(known) = inner.known.get_mut(replica) {
            known.attachment = Some(attachment);
        }
        self.settle(inner);
    }

    /// A stream to a replica is lost.
    pub(crate) fn detach(&self, replica: &str, id: u64) {
        let mut inner = self.inner.lock();
        if let Some(known) = inner.known.get_mut(replica)
            && known.attachment.as_ref().is_some_and(|attachment| attachment.id == id)
        {
            known.attachment = None;
            if known.record.status == ReplicaStatus::Gone {
                inner.known.remove(replica);
            }
        }
        self.settle(inner);
    }

    /// Chooses the model and tells whether there is something to serve. The model changes only when no replica of the old
    /// one is attached any more: requests in flight were checked against it.
    fn settle(&self, mut inner: parking_lot::MutexGuard<'_, Inner>) {
        let attached = |model: &Arc<Model>| {
            inner
                .known
                .values()
                .filter_map(|known| known.attachment.as_ref())
                .any(|a| a.identity.model.digest == model.digest)
        };
        if !inner.model.as_ref().is_some_and(attached) {
            let pinned = inner.pinned.as_ref();
            let models = inner.known.values().filter_map(|known| known.attachment.as_ref()).map(|a| &a.identity.model);
            let next = models.into_iter().find(|model| pinned.is_none_or(|digest| *digest == model.digest)).cloned();
            // Without any, the last model still answers questions about itself.
            inner.model = next.or(inner.model.take());
        }
        let now_ready = inner.ready_now();
        if !now_ready.iter().map(Arc::as_ptr).eq(inner.ready.iter().map(Arc::as_ptr)) {
            inner.board = Board::of(&now_ready);
            inner.ready = now_ready;
        }
        let ready = inner.candidates().count();
        self.ready.send_if_modified(|current| std::mem::replace(current, ready) != ready);
        let draining = inner.draining().next().is_some();
        self.draining.send_if_modified(|current| std::mem::replace(current, draining) != draining);
        let serving = ready > 0;
        self.serving.send_if_modified(|current| std::mem::replace(current, serving) != serving);
    }

    /// The replica where a request would have its first token soonest, none of `tried`.
    pub(crate) fn place(&self, demand: Demand, tried: &[u64]) -> Option<Placement> {
        let inner = self.inner.lock();
        let Chosen { index, report } = inner.board.choose(demand, tried)?;
        let expected_ms = route::expected_ms(&report, demand);
        Some(Placement { attachment: inner.ready.get(index)?.clone(), report, expected_ms })
    }

    /// The replica of that name as the target of a move: its stream, the address of its Replica service, and its load.
    ///
    /// # Errors
    /// NOT_FOUND where it is not known, FAILED_PRECONDITION where it takes no sessions.
    pub(crate) fn target(&self, replica: &str) -> Result<MoveTarget, WireError> {
        let inner = self.inner.lock();
        let known = inner.known.get(replica).ok_or_else(|| error::unknown_replica(replica))?;
        let status = known.status(&inner);
        let ready = inner.candidates().find(|(attachment, _)| *attachment.identity.replica == *replica);
        let Some((attachment, report)) = ready else {
            let message = match status {
                "refused" => format!("replica {replica} serves another model"),
                // Its stream was lost this moment.
                "ready" => format!("replica {replica} is unreachable: a session can move to a ready one only"),
                _ => format!("replica {replica} is {status}: a session can move to a ready one only"),
            };
            return Err(error::cannot_move("TARGET_NOT_READY", message).with_fact("status", status));
        };
        Ok(MoveTarget { attachment: attachment.clone(), endpoint: known.record.internal.clone(), report })
    }

    /// The stream that leads to the same run of a replica as `attachment` did: that itself, or the one that came after it.
    pub(crate) fn live(&self, attachment: &Arc<Attachment>) -> Option<Arc<Attachment>> {
        if attachment.is_live() {
            return Some(attachment.clone());
        }
        let inner = self.inner.lock();
        let now = inner.known.get(&*attachment.identity.replica)?.attachment.clone()?;
        Some(now).filter(|now| now.identity.is_same_run(&attachment.identity) && now.is_live())
    }

    /// Whether a replica other than this one takes requests.
    pub(crate) fn has_other(&self, than: &Attachment) -> bool {
        let inner = self.inner.lock();
        inner.candidates().any(|(attachment, _)| attachment.identity.replica != than.identity.replica)
    }

    /// Every replica that takes requests, by name.
    pub(crate) fn members(&self) -> Vec<Arc<Attachment>> {
        self.inner.lock().candidates().map(|(attachment, _)| attachment.clone()).collect()
    }

    /// All live streams, or that of one replica. `None` where no replica of that name is known.
    pub(crate) fn attachments(&self, replica: &str) -> Option<Vec<Arc<Attachment>>> {
        let inner = self.inner.lock();
        if !replica.is_empty() && !inner.known.contains_key(replica) {
            return None;
        }
        let wanted = inner.known.iter().filter(|(name, _)| replica.is_empty() || *name == replica);
        Some(wanted.filter_map(|(_, known)| known.attachment.clone()).collect())
    }

    /// All replicas as operators see them.
    pub(crate) fn describe(&self) -> Vec<v1::ReplicaInfo> {
        let inner = self.inner.lock();
        inner.known.values().map(|known| known.describe(&inner)).collect()
    }
}

impl Inner {
    fn serves(&self, model: &Model) -> bool {
        self.pinned.as_ref().is_none_or(|digest| *digest == model.digest)
            && self.model.as_ref().is_none_or(|served| served.digest == model.digest)
    }

    fn draining(&self) -> impl Iterator<Item = &Arc<Attachment>> {
        let leaves = |known: &&Known| {
            let is_told = known.record.status == ReplicaStatus::Draining;
            known.attachment.as_ref().is_some_and(|attachment| is_told || attachment.load().draining)
        };
        self.known.values().filter(leaves).filter_map(|known| known.attachment.as_ref())
    }

    fn ready_now(&self) -> Vec<Arc<Attachment>> {
        self.known
            .values()
            .filter(|known| known.record.status == ReplicaStatus::Ready)
            .filter_map(|known| known.attachment.as_ref())
            .filter(|attachment| self.serves(&attachment.identity.model))
            .cloned()
            .collect()
    }

    /// Those of the ready ones that take requests, and their reports.
    fn candidates(&self) -> impl Iterator<Item = (&Arc<Attachment>, Report)> {
        self.ready.iter().filter_map(|attachment| attachment.report().map(|report| (attachment, report)))
    }
}

impl Known {
    fn status(&self, inner: &Inner) -> &'static str {
        let is_ready = self.record.status == ReplicaStatus::Ready;
        match &self.attachment {
            Some(attachment) if !inner.serves(&attachment.identity.model) => "refused",
            Some(attachment) if is_ready && attachment.load().draining => "draining",
            None if is_ready => "unreachable",
            _ => self.record.status.as_str(),
        }
    }

    fn describe(&self, inner: &Inner) -> v1::ReplicaInfo {
        let record = &self.record;
        let identity = self.attachment.as_ref().map(|attachment| &attachment.identity);
        let load = self.attachment.as_ref().map(|attachment| attachment.load()).unwrap_or_default();
        let status = self.status(inner);
        let from_leader = |text: &str, own: fn(&crate::attachment::Identity) -> &str| {
            if text.is_empty() { identity.map(own).unwrap_or_default().to_owned() } else { text.to_owned() }
        };
        v1::ReplicaInfo {
            replica: record.replica.clone(),
            incarnation: from_leader(&record.incarnation, |identity| &identity.incarnation),
            endpoint: record.endpoint.clone(),
            tp: if record.tp > 0 { record.tp } else { identity.map_or(0, |identity| identity.tp) },
            device: from_leader(&record.device, |identity| &identity.device),
            status: status.to_owned(),
            weight_bytes: identity
                .map_or_else(|| record.weight_bytes.clone(), |identity| identity.weight_bytes.clone()),
            slots_free: load.slots_free,
            slots_total: load.slots_total,
            pages_free: load.pages_free,
            pages_total: load.pages_total,
            running: load.running,
            waiting: load.waiting,
            homes: load.homes,
            step_ms: f64::from(load.step_ms),
            pids: identity.map_or_else(|| record.pids.clone(), |identity| identity.pids.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use perigee_proto::internal::{Load, RouterMessage, Submit};
    use tokio::sync::mpsc;

    use super::*;
    use crate::attachment::Identity;
    use crate::model::Defaults;

    const DEMAND: Demand = Demand { prompt_tokens: 10, sessions: 1 };

    fn attachment(id: u64, replica: &str, digest: &str) -> (Arc<Attachment>, mpsc::UnboundedReceiver<RouterMessage>) {
        let model = Model {
            name: digest.to_owned(),
            digest: digest.to_owned(),
            vocab: 10,
            max_len: 100,
            eos: vec![],
            has_tokenizer: false,
            defaults: Defaults::NEUTRAL,
        };
        let identity = Identity {
            replica: Arc::from(replica),
            incarnation: "1".to_owned(),
            model: Arc::new(model),
            tp: 2,
            device: "cpu".to_owned(),
            pids: vec![5, 6],
            weight_bytes: vec![1, 2],
            step_tokens: 512,
            move_costs: None,
        };
        let (outbox, inbox) = mpsc::unbounded_channel();
        let attachment = Attachment::new(id, identity, outbox);
        attachment.set_load(Load {
            slots_free: 4,
            pages_free: 100,
            step_ms: 1.0,
            decode_ms: 1.0,
            prompt_token_ms: 0.01,
            ..Load::default()
        });
        (Arc::new(attachment), inbox)
    }

    fn placed(replicas: &Replicas, tried: &[u64]) -> Option<u64> {
        replicas.place(DEMAND, tried).map(|placement| placement.attachment.id)
    }

    fn status_of(replicas: &Replicas, name: &str) -> String {
        replicas.describe().into_iter().find(|info| info.replica == name).map(|info| info.status).unwrap_or_default()
    }

    #[test]
    fn only_ready_attached_replicas_of_the_served_model_are_placed_on() {
        let replicas = Replicas::new(None);
        for name in ["a", "b", "c"] {
            replicas.insert(ReplicaRecord::new(name, "h:1"));
        }
        assert_eq!((placed(&replicas, &[]), *replicas.serving().borrow()), (None, false));
        let (a, _inbox_a) = attachment(1, "a", "one");
        let (b, _inbox_b) = attachment(2, "b", "two");
        let (c, _inbox_c) = attachment(3, "c", "one");
        replicas.attach("a", a.clone());
        replicas.attach("b", b);
        replicas.attach("c", c);
        assert_eq!((*replicas.serving().borrow(), *replicas.ready().borrow()), (true, 2));
        assert_eq!(placed(&replicas, &[]), Some(1));
        assert_eq!(placed(&replicas, &[1]), Some(3), "b serves another model");
        assert_eq!(placed(&replicas, &[1, 3]), None);
        assert_eq!(status_of(&replicas, "b"), "refused");

        let draining = ReplicaRecord { status: ReplicaStatus::Draining, ..ReplicaRecord::new("a", "h:1") };
        replicas.insert(draining);
        assert_eq!(placed(&replicas, &[]), Some(3));
        assert_eq!(status_of(&replicas, "a"), "draining");

        replicas.detach("c", 99);
        assert_eq!(placed(&replicas, &[]), Some(3), "another attachment was lost");
        replicas.detach("c", 3);
        assert_eq!(placed(&replicas, &[]), None);
        assert_eq!(status_of(&replicas, "c"), "unreachable");
        assert!(!*replicas.serving().borrow());

        replicas.leave("a");
        assert_eq!((status_of(&replicas, "a").as_str(), placed(&replicas, &[])), ("gone", None));
        replicas.detach("a", 1);
        assert_eq!(status_of(&replicas, "a"), "");
        assert_eq!(placed(&replicas, &[]), Some(2), "the old model is gone, the other one takes over");
        assert_eq!(replicas.model().map(|model| model.digest.clone()), Some("two".to_owned()));
    }

    #[test]
    fn a_pinned_model_is_the_only_one() {
        let replicas = Replicas::new(Some("two".to_owned()));
        for name in ["a", "b"] {
            replicas.insert(ReplicaRecord::new(name, "h:1"));
        }
        let (a, _inbox_a) = attachment(1, "a", "one");
        replicas.attach("a", a);
        assert_eq!((placed(&replicas, &[]), replicas.model()), (None, None));
        let (b, _inbox_b) = attachment(2, "b", "two");
        replicas.attach("b", b);
        assert_eq!(placed(&replicas, &[]), Some(2));
    }

    #[test]
    fn very_many_replicas_are_used_in_turn_and_the_last_one_with_room_is_found() {
        let replicas = Replicas::new(None);
        let count = 641;
        let mut streams = Vec::new();
        for id in 0..count {
            let name = format!("r{id:04}");
            replicas.insert(ReplicaRecord::new(&name, "h:1"));
            let (stream, inbox) = attachment(id, &name, "one");
            replicas.attach(&name, stream.clone());
            streams.push((stream, inbox));
        }
        let submit = Submit { sessions: vec!["s".to_owned()], prompt: vec![1; 10], ..Submit::default() };
        let mut found = std::collections::BTreeSet::new();
        for _ in 0..count {
            let placement = replicas.place(DEMAND, &[]).expect("room");
            placement.attachment.submit(submit.clone()).expect("live");
            found.insert(placement.attachment.id);
        }
        assert_eq!(found.len() as u64, count, "each was the one with fewest sessions once");

        let full = Load { slots_total: 4, pages_free: 100, running: 4, ..Load::default() };
        for (stream, _) in streams.iter().filter(|(stream, _)| stream.id != 77) {
            stream.set_load(full);
        }
        assert_eq!(placed(&replicas, &[]), Some(77), "it alone has room");
        assert!(placed(&replicas, &[77]).is_some(), "else requests wait at one of the others");
    }

    #[test]
    fn streams_keep_reporting_when_the_set_of_replicas_changes() {
        let replicas = Replicas::new(None);
        for name in ["a", "b", "c"] {
            replicas.insert(ReplicaRecord::new(name, "h:1"));
        }
        let (b, _inbox_b) = attachment(2, "b", "one");
        let (c, _inbox_c) = attachment(3, "c", "one");
        replicas.attach("b", b.clone());
        replicas.attach("c", c.clone());
        let full = Load { slots_total: 4, running: 4, ..Load::default() };
        b.set_load(full);
        assert_eq!(placed(&replicas, &[]), Some(3));
        let (a, _inbox_a) = attachment(1, "a", "one");
        a.set_load(full);
        replicas.attach("a", a.clone());
        assert_eq!(placed(&replicas, &[]), Some(3), "its row is another one now");
        c.set_load(full);
        b.set_load(Load { running: 0, slots_free: 4, pages_free: 100, ..full });
        assert_eq!(placed(&replicas, &[]), Some(2));
        b.set_load(Load { draining: true, ..b.load() });
        assert_eq!(placed(&replicas, &[2]), placed(&replicas, &[]), "it drains");
        replicas.leave("a");
        c.close();
        assert_eq!(placed(&replicas, &[]), None);
    }

    #[test]
    fn requests_sent_since_the_last_report_count() {
        let replicas = Replicas::new(None);
        for name in ["a", "b"] {
            replicas.insert(ReplicaRecord::new(name, "h:1"));
        }
        let (a, _inbox_a) = attachment(1, "a", "one");
        let (b, _inbox_b) = attachment(2, "b", "one");
        replicas.attach("a", a.clone());
        replicas.attach("b", b);
        let submit = Submit { sessions: vec!["s".to_owned()], prompt: vec![1; 1000], ..Submit::default() };
        a.submit(submit).expect("live");
        assert_eq!(placed(&replicas, &[]), Some(2));
        a.set_load(a.load());
        assert_eq!(placed(&replicas, &[]), Some(1), "the report has it now");
        a.close();
        assert_eq!(placed(&replicas, &[]), Some(2));
        let info = &replicas.describe()[1];
        assert_eq!((info.tp, info.device.as_str(), info.pids.as_slice()), (2, "cpu", [5, 6].as_slice()));
    }
}
