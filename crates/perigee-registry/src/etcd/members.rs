//! The records in etcd as one watcher knows them: built from a listing, kept up to date by events, safe against events that
//! come again, late or never. Pure bookkeeping; connections and clocks are the watcher's.

use std::collections::BTreeMap;

use crate::{RegistryError, ReplicaRecord};

/// Most bytes of a record. Ten times what a replica of 64 ranks needs.
pub(super) const MAX_RECORD: usize = 16 << 10;

/// A key as etcd has it, from a listing or an event.
#[derive(Debug, Clone)]
pub(super) struct Stored {
    pub(super) key: String,
    /// The revision of etcd's store at which the key was written, or removed.
    pub(super) revision: i64,
    /// `None` where the key was removed.
    pub(super) value: Option<Vec<u8>>,
}

/// A key whose value is no record.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Malformed {
    pub(super) key: String,
    pub(super) reason: String,
}

#[derive(Debug)]
struct Entry {
    revision: i64,
    /// `None` for a malformed one: it is remembered, so that it is told of once.
    record: Option<ReplicaRecord>,
}

/// What is known.
#[derive(Debug, Default)]
pub(super) struct Members {
    /// Up to here everything has been seen.
    revision: i64,
    entries: BTreeMap<String, Entry>,
    /// Records that vanished while etcd was away, by replica: see [`Members::relist`].
    held: BTreeMap<String, ReplicaRecord>,
}

impl Members {
    /// Replaces all that is known by a listing of `prefix` as of `revision`.
    ///
    /// With `away`, etcd was out of reach before: records that it lost meanwhile are held until [`Members::release`],
    /// because an etcd that lost its data has lost them all, and their publishers are about to write them again.
    pub(super) fn relist(&mut self, prefix: &str, listed: Vec<Stored>, revision: i64, away: bool) -> Vec<Malformed> {
        let former = std::mem::take(&mut self.entries);
        let mut malformed = Vec::new();
        for stored in listed {
            let known_bad = former
                .get(&stored.key)
                .is_some_and(|entry| entry.record.is_none() && entry.revision == stored.revision);
            let found = self.put(prefix, stored);
            malformed.extend(found.filter(|_| !known_bad));
        }
        // Even where it is smaller than before: then it is another store, and old events of the former one are gone.
        self.revision = revision;
        if away {
            let former = former.into_values().filter_map(|entry| entry.record);
            self.held.extend(former.map(|record| (record.replica.clone(), record)));
        }
        self.let_go_of_present();
        malformed
    }

    /// Takes in one event; one that is older than what is known changes nothing.
    pub(super) fn apply(&mut self, prefix: &str, event: Stored) -> Option<Malformed> {
        // A revision may write several keys, but each of them once.
        let known = self.entries.get(&event.key).is_some_and(|entry| entry.revision == event.revision);
        if event.revision < self.revision || known {
            return None;
        }
        self.revision = event.revision;
        if event.value.is_some() {
            let malformed = self.put(prefix, event);
            self.let_go_of_present();
            return malformed;
        }
        self.entries.remove(&event.key);
        if let Some(replica) = event.key.strip_prefix(prefix) {
            self.held.remove(replica);
        }
        None
    }

    /// Lets go of records that were held; says whether there were any.
    pub(super) fn release(&mut self) -> bool {
        !std::mem::take(&mut self.held).is_empty()
    }

    /// Whether records are held.
    pub(super) fn holds(&self) -> bool {
        !self.held.is_empty()
    }

    /// All records, by replica.
    pub(super) fn records(&self) -> BTreeMap<String, ReplicaRecord> {
        let present = self.entries.values().filter_map(|entry| entry.record.as_ref());
        let present = present.map(|record| (record.replica.clone(), record.clone()));
        self.held.iter().map(|(name, record)| (name.clone(), record.clone())).chain(present).collect()
    }

    fn put(&mut self, prefix: &str, stored: Stored) -> Option<Malformed> {
        let name = stored.key.strip_prefix(prefix).unwrap_or_default();
        let (record, malformed) = match decode(name, stored.value.as_deref().unwrap_or_default()) {
            Ok(record) => (Some(record), None),
            Err(reason) => (None, Some(Malformed { key: stored.key.clone(), reason })),
        };
        self.entries.insert(stored.key, Entry { revision: stored.revision, record });
        malformed
    }

    fn let_go_of_present(&mut self) {
        for record in self.entries.values().filter_map(|entry| entry.record.as_ref()) {
            self.held.remove(&record.replica);
        }
    }
}

/// A record as it is written.
pub(super) fn encode(record: &ReplicaRecord) -> Result<Vec<u8>, RegistryError> {
    let invalid = |field, rule, found| RegistryError::InvalidRecord { field, rule, found };
    record.validate()?;
    if record.incarnation.is_empty() {
        return Err(invalid("incarnation", "must not be empty: it tells who has the name", String::new()));
    }
    let value = serde_json::to_vec(record)
        .map_err(|error| invalid("record", "must have a JSON representation", error.to_string()))?;
    if value.len() > MAX_RECORD {
        let replica = record.replica.clone();
        return Err(RegistryError::RecordTooLarge { replica, bytes: value.len(), limit: MAX_RECORD });
    }
    Ok(value)
}

/// The record under the key of replica `name`, or what is wrong with it.
fn decode(name: &str, value: &[u8]) -> Result<ReplicaRecord, String> {
    if value.len() > MAX_RECORD {
        return Err(format!("{} bytes are more than the {MAX_RECORD} that a record may have", value.len()));
    }
    let record: ReplicaRecord = serde_json::from_slice(value).map_err(|error| error.to_string())?;
    record.validate().map_err(|error| error.to_string())?;
    if record.replica != name {
        return Err(format!("it holds the record of replica {:?}", record.replica));
    }
    Ok(record)
}

/// Whose record a value is. It reads no more than that, so that it understands records of other versions of Perigee.
pub(super) fn holder(value: &[u8]) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Holder {
        incarnation: String,
    }
    serde_json::from_slice::<Holder>(value).ok().map(|holder| holder.incarnation)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ReplicaStatus;

    const PREFIX: &str = "/perigee/replicas/";

    fn record(name: &str, incarnation: &str) -> ReplicaRecord {
        ReplicaRecord { incarnation: incarnation.to_owned(), ..ReplicaRecord::new(name, "h:1") }
    }

    fn stored(name: &str, revision: i64, value: impl Into<Vec<u8>>) -> Stored {
        Stored { key: format!("{PREFIX}{name}"), revision, value: Some(value.into()) }
    }

    fn put(name: &str, incarnation: &str, revision: i64) -> Stored {
        stored(name, revision, encode(&record(name, incarnation)).expect("a valid record"))
    }

    fn removal(name: &str, revision: i64) -> Stored {
        Stored { value: None, ..stored(name, revision, "") }
    }

    fn names(members: &Members) -> Vec<String> {
        members.records().values().map(|record| format!("{}/{}", record.replica, record.incarnation)).collect()
    }

    #[test]
    fn repeated_and_old_events_change_nothing() {
        let mut members = Members::default();
        assert_eq!(members.relist(PREFIX, vec![put("a", "1", 3), put("b", "1", 5)], 6, false), []);
        let history = [put("a", "1", 3), removal("b", 7), put("c", "1", 8), put("a", "2", 9), removal("c", 10)];
        for event in history.clone() {
            assert_eq!(members.apply(PREFIX, event), None);
        }
        assert_eq!(names(&members), ["a/2"]);
        for event in history {
            assert_eq!(members.apply(PREFIX, event), None);
            assert_eq!(names(&members), ["a/2"]);
        }
        members.apply(PREFIX, put("d", "1", 11));
        members.apply(PREFIX, put("e", "1", 11));
        assert_eq!(names(&members), ["a/2", "d/1", "e/1"], "one revision writes several keys");
    }

    #[test]
    fn a_listing_makes_up_for_missing_events() {
        let mut members = Members::default();
        members.relist(PREFIX, vec![put("a", "1", 3), put("b", "1", 5)], 6, false);
        members.relist(PREFIX, vec![put("b", "2", 8), put("c", "1", 9)], 9, false);
        assert_eq!(names(&members), ["b/2", "c/1"]);
        assert!(!members.holds());
    }

    #[test]
    fn what_vanished_while_etcd_was_away_is_held_for_a_while() {
        let mut members = Members::default();
        members.relist(PREFIX, vec![put("a", "1", 30), put("b", "1", 31), put("c", "1", 32)], 33, true);
        assert!(!members.holds());
        // Another store, with revisions from the beginning.
        members.relist(PREFIX, vec![], 1, true);
        assert_eq!(names(&members), ["a/1", "b/1", "c/1"]);
        members.apply(PREFIX, put("a", "1", 2));
        members.apply(PREFIX, put("b", "2", 3));
        assert_eq!(names(&members), ["a/1", "b/2", "c/1"]);
        members.relist(PREFIX, vec![put("a", "1", 2), put("b", "2", 3)], 3, false);
        assert_eq!(names(&members), ["a/1", "b/2", "c/1"], "a later listing still holds it");
        assert!(members.release());
        assert_eq!(names(&members), ["a/1", "b/2"]);
        assert!(!members.release());
    }

    #[test]
    fn malformed_values_are_skipped_and_told_of_once() {
        let long = ReplicaRecord { device: "x".repeat(MAX_RECORD), ..record("long", "1") };
        assert!(matches!(encode(&long), Err(RegistryError::RecordTooLarge { .. })));
        assert!(matches!(encode(&record("a", "")), Err(RegistryError::InvalidRecord { field: "incarnation", .. })));
        let long = serde_json::to_vec(&long).expect("it serialises");
        let other = encode(&record("other", "1")).expect("a valid record");
        let listed = vec![
            put("good", "1", 2),
            stored("empty", 3, ""),
            stored("binary", 4, [0xff, 0x00]),
            stored("long", 5, long),
            stored("misplaced", 6, other),
            stored("nowhere", 7, r#"{"replica": "nowhere", "internal": ""}"#),
        ];
        let mut members = Members::default();
        let told: Vec<_> =
            members.relist(PREFIX, listed.clone(), 7, false).into_iter().map(|malformed| malformed.key).collect();
        let bad = ["empty", "binary", "long", "misplaced", "nowhere"].map(|name| format!("{PREFIX}{name}"));
        assert_eq!(told, bad);
        assert_eq!(names(&members), ["good/1"]);
        assert_eq!(members.relist(PREFIX, listed, 7, false), []);
        let again = members.apply(PREFIX, stored("empty", 8, "{}")).expect("it was written again");
        assert!(again.reason.contains("replica"), "{}", again.reason);
        members.apply(PREFIX, stored("good", 9, "x"));
        assert_eq!(names(&members), [""; 0], "every watcher sees the same, whenever it began");
        assert_eq!(members.apply(PREFIX, put("good", "1", 10)), None);
        assert_eq!(names(&members), ["good/1"]);
    }

    #[test]
    fn records_are_read_as_they_were_written() {
        let full = ReplicaRecord {
            endpoint: "h:2".to_owned(),
            digest: "d".to_owned(),
            tp: 2,
            device: "cpu".to_owned(),
            status: ReplicaStatus::Draining,
            pids: vec![1, 2],
            weight_bytes: vec![3, 4],
            ..record("a", "1")
        };
        let value = encode(&full).expect("a valid record");
        assert_eq!(decode("a", &value), Ok(full));
        let later = br#"{"replica": "a", "incarnation": "3", "internal": "h:1", "later": {}}"#;
        assert_eq!(decode("a", later), Ok(record("a", "3")));
        assert_eq!(holder(&value).as_deref(), Some("1"));
        assert_eq!(holder(br#"{"incarnation": "2", "later": true}"#).as_deref(), Some("2"));
        assert_eq!(holder(b"x"), None);
    }
}
