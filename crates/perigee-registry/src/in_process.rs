//! Membership inside one process, for the embedded cluster and for tests. Workers of the embedded cluster are other
//! processes: their parent registers each replica when its leader reports that it is ready, and removes it when it ends.

use std::sync::Arc;

use crate::{BoxFuture, Publication, Registry, RegistryError, ReplicaRecord, Watch, WatchSource};

/// A registry in memory. Clones share their content.
#[derive(Debug, Clone, Default)]
pub struct InProcessRegistry {
    source: Arc<WatchSource>,
}

impl InProcessRegistry {
    /// Adds a replica, or replaces the record of that name.
    ///
    /// # Errors
    /// [`RegistryError::InvalidRecord`].
    pub fn register(&self, record: ReplicaRecord) -> Result<(), RegistryError> {
        record.validate()?;
        self.source.modify(|map| {
            let name = record.replica.clone();
            map.insert(name, record.clone()).as_ref() != Some(&record)
        });
        Ok(())
    }

    /// Removes a replica; nothing happens where there is none of that name.
    pub fn remove(&self, replica: &str) {
        self.source.modify(|map| map.remove(replica).is_some());
    }

    /// The replicas as they are, by name.
    pub fn records(&self) -> Vec<ReplicaRecord> {
        self.source.snapshot().values().cloned().collect()
    }
}

impl Registry for InProcessRegistry {
    fn publish(&self, record: ReplicaRecord) -> BoxFuture<'_, Result<Box<dyn Publication>, RegistryError>> {
        Box::pin(async move {
            record.validate()?;
            let mut taken = None;
            self.source.modify(|map| match map.get(&record.replica) {
                Some(other) if other.incarnation != record.incarnation => {
                    taken = Some(other.incarnation.clone());
                    false
                }
                _ => map.insert(record.replica.clone(), record.clone()).as_ref() != Some(&record),
            });
            if let Some(incarnation) = taken {
                return Err(RegistryError::NameTaken { replica: record.replica, incarnation });
            }
            let publication = InProcessPublication {
                source: self.source.clone(),
                replica: record.replica,
                incarnation: record.incarnation,
            };
            Ok(Box::new(publication) as Box<dyn Publication>)
        })
    }

    fn watch(&self) -> Watch {
        self.source.watch()
    }
}

struct InProcessPublication {
    source: Arc<WatchSource>,
    replica: String,
    incarnation: String,
}

impl Publication for InProcessPublication {
    fn update(&self, record: ReplicaRecord) -> BoxFuture<'_, Result<(), RegistryError>> {
        Box::pin(async move {
            record.validate()?;
            let same = record.replica == self.replica && record.incarnation == self.incarnation;
            let mut published = false;
            if same {
                self.source.modify(|map| match map.get_mut(&record.replica) {
                    Some(current) if current.incarnation == record.incarnation => {
                        published = true;
                        let changes = *current != record;
                        *current = record.clone();
                        changes
                    }
                    _ => false,
                });
            }
            if published {
                return Ok(());
            }
            Err(RegistryError::NotPublished { replica: record.replica, incarnation: record.incarnation })
        })
    }
}

impl Drop for InProcessPublication {
    fn drop(&mut self) {
        self.source.modify(|map| {
            let mine = map.get(&self.replica).is_some_and(|record| record.incarnation == self.incarnation);
            mine && map.remove(&self.replica).is_some()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Change, ReplicaStatus};

    fn record(incarnation: &str) -> ReplicaRecord {
        ReplicaRecord { incarnation: incarnation.to_owned(), ..ReplicaRecord::new("a", "h:1") }
    }

    #[tokio::test]
    async fn a_publication_lives_as_long_as_its_guard() {
        let registry = InProcessRegistry::default();
        let mut watch = registry.watch();
        assert_eq!(watch.next().await, Some(vec![]));
        let publication = registry.publish(record("1")).await.expect("published");
        assert_eq!(watch.next().await, Some(vec![Change::Added(record("1"))]));
        let draining = ReplicaRecord { status: ReplicaStatus::Draining, ..record("1") };
        publication.update(draining.clone()).await.expect("updated");
        assert_eq!(watch.next().await, Some(vec![Change::Updated(draining)]));
        drop(publication);
        let removed = Change::Removed { replica: "a".to_owned(), incarnation: "1".to_owned() };
        assert_eq!(watch.next().await, Some(vec![removed]));
    }

    #[tokio::test]
    async fn a_name_belongs_to_one_incarnation() {
        let registry = InProcessRegistry::default();
        let first = registry.publish(record("1")).await.expect("published");
        assert!(matches!(registry.publish(record("2")).await, Err(RegistryError::NameTaken { .. })));
        assert!(matches!(first.update(record("2")).await, Err(RegistryError::NotPublished { .. })));
        registry.register(record("2")).expect("the parent process may replace it");
        assert!(matches!(first.update(record("1")).await, Err(RegistryError::NotPublished { .. })));
        drop(first);
        assert_eq!(registry.records(), [record("2")], "the old guard does not remove the new incarnation");
        registry.remove("a");
        assert_eq!(registry.records(), []);
    }
}
