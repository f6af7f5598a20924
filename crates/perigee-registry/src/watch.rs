//! Changes of membership, computed by comparing whole snapshots. So a source that repeats, loses or reorders its own
//! events only has to list again: nobody downstream sees a difference that is not there.

use std::{collections::BTreeMap, sync::Arc};

use tokio::sync::watch;

use crate::ReplicaRecord;

/// All known replicas, by name.
pub type Snapshot = Arc<BTreeMap<String, ReplicaRecord>>;

/// One difference between two snapshots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A replica that was not there before, or another incarnation of one that was.
    Added(ReplicaRecord),
    /// The same incarnation with other facts, usually its status.
    Updated(ReplicaRecord),
    /// A replica that is no longer there.
    Removed {
        /// Its name.
        replica: String,
        /// Its incarnation.
        incarnation: String,
    },
}

/// What `after` has that `before` had not. A new incarnation is a removal and an addition.
fn differences(before: &BTreeMap<String, ReplicaRecord>, after: &BTreeMap<String, ReplicaRecord>) -> Vec<Change> {
    let removed = |record: &ReplicaRecord| Change::Removed {
        replica: record.replica.clone(),
        incarnation: record.incarnation.clone(),
    };
    let mut changes = Vec::new();
    for (name, old) in before {
        if after.get(name).is_none_or(|new| new.incarnation != old.incarnation) {
            changes.push(removed(old));
        }
    }
    for (name, new) in after {
        match before.get(name) {
            Some(old) if old == new => {}
            Some(old) if old.incarnation == new.incarnation => changes.push(Change::Updated(new.clone())),
            _ => changes.push(Change::Added(new.clone())),
        }
    }
    changes
}

/// The reading end: one consumer's view of the changes.
#[derive(Debug)]
pub struct Watch {
    source: watch::Receiver<Snapshot>,
    seen: Snapshot,
    started: bool,
}

impl Watch {
    /// The next changes: at first all replicas that are there (perhaps none), later at least one difference. `None`
    /// once the registry is gone. Cancelling the wait loses nothing.
    pub async fn next(&mut self) -> Option<Vec<Change>> {
        loop {
            if self.started {
                self.source.changed().await.ok()?;
            }
            let snapshot = self.source.borrow_and_update().clone();
            let changes = differences(&self.seen, &snapshot);
            self.seen = snapshot;
            if !self.started || !changes.is_empty() {
                self.started = true;
                return Some(changes);
            }
        }
    }
}

/// The writing end: what a registry keeps.
#[derive(Debug)]
pub struct WatchSource {
    sender: watch::Sender<Snapshot>,
}

impl Default for WatchSource {
    fn default() -> Self {
        Self { sender: watch::Sender::new(Arc::default()) }
    }
}

impl WatchSource {
    /// Another consumer.
    pub fn watch(&self) -> Watch {
        Watch { source: self.sender.subscribe(), seen: Arc::default(), started: false }
    }

    /// Changes the snapshot as one; `change` says whether it changed anything.
    pub fn modify(&self, change: impl FnOnce(&mut BTreeMap<String, ReplicaRecord>) -> bool) {
        self.sender.send_if_modified(|snapshot| change(Arc::make_mut(snapshot)));
    }

    /// Completes when there is no consumer.
    pub async fn unwatched(&self) {
        self.sender.closed().await;
    }

    /// Whether there is a consumer.
    pub fn is_watched(&self) -> bool {
        !self.sender.is_closed()
    }

    /// The snapshot as it is.
    pub fn snapshot(&self) -> Snapshot {
        self.sender.borrow().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ReplicaStatus;

    fn record(name: &str, incarnation: &str, status: ReplicaStatus) -> ReplicaRecord {
        ReplicaRecord { incarnation: incarnation.to_owned(), status, ..ReplicaRecord::new(name, "h:1") }
    }

    fn map(records: &[ReplicaRecord]) -> BTreeMap<String, ReplicaRecord> {
        records.iter().map(|record| (record.replica.clone(), record.clone())).collect()
    }

    #[test]
    fn differences_name_each_change_once() {
        use ReplicaStatus::{Draining, Ready};
        let before = map(&[record("a", "1", Ready), record("b", "1", Ready), record("c", "1", Ready)]);
        let after = map(&[record("b", "1", Draining), record("c", "2", Ready), record("d", "1", Ready)]);
        let removed = |name: &str| Change::Removed { replica: name.to_owned(), incarnation: "1".to_owned() };
        assert_eq!(
            differences(&before, &after),
            [
                removed("a"),
                removed("c"),
                Change::Updated(record("b", "1", Draining)),
                Change::Added(record("c", "2", Ready)),
                Change::Added(record("d", "1", Ready)),
            ]
        );
        assert_eq!(differences(&after, &after), []);
    }

    #[tokio::test]
    async fn a_late_watch_begins_with_what_is_there_and_skips_what_cancels_out() {
        let source = WatchSource::default();
        let a = record("a", "1", ReplicaStatus::Ready);
        source.modify(|map| map.insert("a".to_owned(), a.clone()).is_none());
        let mut watch = source.watch();
        assert_eq!(watch.next().await, Some(vec![Change::Added(a.clone())]));

        let b = record("b", "1", ReplicaStatus::Ready);
        source.modify(|map| map.insert("b".to_owned(), b.clone()).is_none());
        source.modify(|map| map.remove("b").is_some());
        let draining = record("a", "1", ReplicaStatus::Draining);
        source.modify(|map| map.insert("a".to_owned(), draining.clone()).is_some());
        assert_eq!(watch.next().await, Some(vec![Change::Updated(draining)]));

        drop(source);
        assert_eq!(watch.next().await, None);
    }
}
