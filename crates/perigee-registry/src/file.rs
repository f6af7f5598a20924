//! Membership from a file that lists every replica's address: for clusters that never change. It is read once; whether a
//! listed replica lives, and what it serves, a router learns by attaching to it.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Deserialize;

use crate::{BoxFuture, Publication, Registry, RegistryError, ReplicaRecord, ReplicaStatus, Watch, WatchSource};

/// A static registry. The file is JSON: `{"replicas": [{"replica": "a", "internal": "10.0.0.1:7001"}]}`; the fields of a
/// replica are those of [`ReplicaRecord`], and unknown ones are an error.
#[derive(Debug)]
pub struct FileRegistry {
    path: PathBuf,
    source: Arc<WatchSource>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    replicas: Vec<serde_json::Map<String, serde_json::Value>>,
}

impl FileRegistry {
    /// Reads the file.
    ///
    /// # Errors
    /// [`RegistryError::Read`] and [`RegistryError::Malformed`], the latter also for a replica that is listed twice;
    /// [`RegistryError::InvalidRecord`] for a bad name or address.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, RegistryError> {
        let path = path.as_ref().to_owned();
        let text =
            std::fs::read_to_string(&path).map_err(|source| RegistryError::Read { path: path.clone(), source })?;
        let records = parse(&text, &path)?;
        let source = WatchSource::default();
        source.modify(|map| {
            *map = records;
            true
        });
        Ok(Self { path, source: Arc::new(source) })
    }
}

fn parse(text: &str, path: &Path) -> Result<BTreeMap<String, ReplicaRecord>, RegistryError> {
    let malformed = |reason: String| RegistryError::Malformed { path: path.to_owned(), reason };
    let content: Content = serde_json::from_str(text).map_err(|error| malformed(error.to_string()))?;
    let mut records = BTreeMap::new();
    for listed in content.replicas {
        let record = record(listed).map_err(malformed)?;
        record.validate()?;
        let name = record.replica.clone();
        if records.insert(name.clone(), record).is_some() {
            return Err(malformed(format!("replica {name} is listed twice")));
        }
    }
    Ok(records)
}

/// A record that a person wrote: a field of an unknown name is a slip of the pen, and no later version's.
fn record(listed: serde_json::Map<String, serde_json::Value>) -> Result<ReplicaRecord, String> {
    let names: Vec<String> = listed.keys().cloned().collect();
    let record: ReplicaRecord = serde_json::from_value(listed.into()).map_err(|error| error.to_string())?;
    let known = serde_json::to_value(&record).map_err(|error| error.to_string())?;
    match names.iter().find(|name| known.get(name).is_none()) {
        Some(name) => Err(format!("unknown field {name:?} of replica {}", record.replica)),
        None if record.status == ReplicaStatus::Unknown => Err(format!("unknown status of replica {}", record.replica)),
        None => Ok(record),
    }
}

impl Registry for FileRegistry {
    /// Checks that the file lists the replica with that address; there is nothing to write.
    fn publish(&self, record: ReplicaRecord) -> BoxFuture<'_, Result<Box<dyn Publication>, RegistryError>> {
        Box::pin(async move {
            record.validate()?;
            if !self.source.snapshot().contains_key(&record.replica) {
                return Err(RegistryError::NotListed { path: self.path.clone(), replica: record.replica });
            }
            let publication = Listed { replica: record.replica, incarnation: record.incarnation };
            Ok(Box::new(publication) as Box<dyn Publication>)
        })
    }

    fn watch(&self) -> Watch {
        self.source.watch()
    }
}

struct Listed {
    replica: String,
    incarnation: String,
}

impl Publication for Listed {
    fn update(&self, record: ReplicaRecord) -> BoxFuture<'_, Result<(), RegistryError>> {
        Box::pin(async move {
            if record.replica != self.replica || record.incarnation != self.incarnation {
                return Err(RegistryError::NotPublished { replica: record.replica, incarnation: record.incarnation });
            }
            record.validate()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Change;

    fn parse_text(text: &str) -> Result<BTreeMap<String, ReplicaRecord>, RegistryError> {
        parse(text, Path::new("replicas.json"))
    }

    #[test]
    fn bad_files_are_refused_with_a_reason() {
        for (text, part) in [
            ("", "EOF"),
            (r#"{"replica": []}"#, "unknown field"),
            (r#"{"replicas": [{"replica": "a"}]}"#, "internal"),
            (r#"{"replicas": [{"replica": "a", "internal": "h:1", "port": 1}]}"#, "unknown field"),
            (r#"{"replicas": [{"replica": "a", "internal": "h:1", "status": "red"}]}"#, "unknown status"),
            (r#"{"replicas": [{"replica": "a", "internal": "h"}]}"#, "host:port"),
            (r#"{"replicas": [{"replica": "a", "internal": "h:1"}, {"replica": "a", "internal": "h:2"}]}"#, "twice"),
        ] {
            let message = parse_text(text).expect_err(text).to_string();
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
    }

    #[tokio::test]
    async fn listed_replicas_are_watched_and_may_publish() {
        let folder = std::env::temp_dir().join(format!("perigee-registry-{}", std::process::id()));
        std::fs::write(&folder, r#"{"replicas": [{"replica": "a", "internal": "h:1"}]}"#).expect("written");
        let registry = FileRegistry::open(&folder).expect("read");
        std::fs::remove_file(&folder).expect("removed");
        let record = ReplicaRecord::new("a", "h:1");
        assert_eq!(record.status, ReplicaStatus::Ready);
        assert_eq!(registry.watch().next().await, Some(vec![Change::Added(record.clone())]));
        let publication = registry.publish(record.clone()).await.expect("listed");
        publication.update(record).await.expect("the same replica");
        let other = ReplicaRecord::new("b", "h:2");
        assert!(matches!(publication.update(other.clone()).await, Err(RegistryError::NotPublished { .. })));
        assert!(matches!(registry.publish(other).await, Err(RegistryError::NotListed { .. })));
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = FileRegistry::open("/no/such/replicas.json").expect_err("it is missing").to_string();
        assert!(error.contains("/no/such/replicas.json"), "{error}");
    }
}
