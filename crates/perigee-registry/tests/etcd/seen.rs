//! What a consumer of the registry sees over time: every change in order, and the set that they add up to.

use std::collections::BTreeMap;

use perigee_registry::{Change, ReplicaRecord, Watch};

use crate::server::DEADLINE;

pub(crate) struct Seen {
    watch: Watch,
    pub(crate) records: BTreeMap<String, ReplicaRecord>,
    pub(crate) changes: Vec<Change>,
}

impl Seen {
    pub(crate) fn new(watch: Watch) -> Self {
        Self { watch, records: BTreeMap::new(), changes: Vec::new() }
    }

    /// Takes in changes until the set is as wanted.
    pub(crate) async fn until(&mut self, what: &str, wanted: impl Fn(&BTreeMap<String, ReplicaRecord>) -> bool) {
        let seen = async {
            while !wanted(&self.records) {
                for change in self.watch.next().await.expect("the watch goes on") {
                    self.take_in(change);
                }
            }
        };
        if tokio::time::timeout(DEADLINE, seen).await.is_err() {
            panic!("waited in vain for {what}; seen {:?}, now {:?}", self.changes, self.records);
        }
    }

    /// Takes in changes until exactly these replicas are there.
    pub(crate) async fn until_names(&mut self, names: &[&str]) {
        self.until(&format!("{names:?}"), |records| records.keys().eq(names)).await;
    }

    /// How often replicas left.
    pub(crate) fn removals(&self) -> usize {
        self.changes.iter().filter(|change| matches!(change, Change::Removed { .. })).count()
    }

    fn take_in(&mut self, change: Change) {
        match &change {
            Change::Added(record) => {
                let former = self.records.insert(record.replica.clone(), record.clone());
                assert_eq!(former, None, "an addition of what is there");
            }
            Change::Updated(record) => {
                let former = self.records.insert(record.replica.clone(), record.clone());
                let former = former.expect("an update of what is there");
                assert_eq!(former.incarnation, record.incarnation);
            }
            Change::Removed { replica, incarnation } => {
                let former = self.records.remove(replica).expect("a removal of what is there");
                assert_eq!(former.incarnation, *incarnation);
            }
        }
        self.changes.push(change);
    }
}
