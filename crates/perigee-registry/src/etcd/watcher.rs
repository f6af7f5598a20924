//! Watches the records in etcd on a thread of its own and shows them to all consumers. It begins every connection with a
//! listing, so it depends on no event having come; between connections the last known set stands.

use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;

use etcd_client::{KeyValue, WatchOptions, WatchResponse};
use tokio::time::{Instant, sleep, sleep_until};

use super::calls::{Backoff, Connector, Trouble, list, within};
use super::members::{Malformed, Members, Stored};
use super::{EtcdConfig, Slot};
use crate::{RegistryError, WatchSource};

/// A listing at least this often, should an event get lost in a way that nobody noticed.
const RELIST: Duration = Duration::from_secs(60);
/// Longest pause between attempts to reach etcd.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Watches until there is no consumer; then empties the slot, so that the next consumer starts another thread.
pub(super) fn start(config: Arc<EtcdConfig>, source: Arc<WatchSource>, slot: Slot) -> Result<(), RegistryError> {
    let watch = move || {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                // The source goes with this thread, so consumers see that their watch has ended.
                tracing::error!(%error, "no runtime to watch etcd");
                return;
            }
        };
        let mut watcher = Watcher {
            prefix: config.records(),
            config,
            connector: Connector::new(),
            backoff: Backoff::new(LONGEST_PAUSE),
            members: Members::default(),
            held_until: None,
            away: false,
            source,
        };
        loop {
            runtime.block_on(watcher.follow());
            let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
            // Under the lock, since a new consumer may have found the source just now.
            if !watcher.source.is_watched() {
                *slot = Weak::new();
                return;
            }
        }
    };
    std::thread::Builder::new()
        .name("perigee-watch".to_owned())
        .spawn(watch)
        .map_err(|source| RegistryError::System { what: "a thread for etcd", source })?;
    Ok(())
}

struct Watcher {
    config: Arc<EtcdConfig>,
    prefix: String,
    connector: Connector,
    backoff: Backoff,
    members: Members,
    /// When records that vanished while etcd was away are let go of.
    held_until: Option<Instant>,
    /// The last attempt failed.
    away: bool,
    source: Arc<WatchSource>,
}

impl Watcher {
    /// Until there is no consumer.
    async fn follow(&mut self) {
        let source = self.source.clone();
        tokio::select! {
            () = source.unwatched() => {}
            () = self.follow_on() => {}
        }
    }

    async fn follow_on(&mut self) {
        loop {
            let Err(error) = self.session().await else { continue };
            let endpoints = self.config.endpoints.join(",");
            if !self.away {
                tracing::warn!(endpoints, %error, "etcd is away; the last known replicas stand");
            }
            self.away = true;
            sleep(self.backoff.pause()).await;
        }
    }

    /// One listing and the events after it. Returns in order where it is time for another listing.
    async fn session(&mut self) -> Result<(), Trouble> {
        let mut client = self.connector.client(&self.config).await?;
        let limit = self.config.call_timeout;
        let (listed, revision) = list(&client, &self.prefix, limit).await?;
        let away = std::mem::take(&mut self.away);
        if away {
            tracing::info!("etcd answers again");
        }
        self.backoff.reset();
        let listed = listed.into_iter().map(|present| stored(&present)).collect();
        let malformed = self.members.relist(&self.prefix, listed, revision, away);
        tell(malformed);
        if away {
            // By then, publishers that live have found that their lease is gone.
            self.held_until = self.members.holds().then(|| Instant::now() + self.config.lease_ttl);
        }
        self.show();

        let options = WatchOptions::new().with_prefix().with_start_revision(revision + 1).with_fragment();
        let mut events = within(limit, client.watch(self.prefix.as_str(), Some(options))).await?;
        let relist = Instant::now() + RELIST;
        loop {
            let pause = self.held_until.map_or(relist, |until| until.min(relist));
            let response = tokio::select! {
                response = events.message() => response?,
                () = sleep_until(pause) => {
                    self.let_go();
                    if Instant::now() >= relist {
                        return Ok(());
                    }
                    continue;
                }
            };
            let response = response.ok_or_else(|| Trouble::Broken("the watch ended".to_owned()))?;
            if response.compact_revision() > 0 {
                // What came after the listing is no longer told one by one.
                return Ok(());
            }
            if response.canceled() {
                return Err(Trouble::Broken(format!("the watch was cancelled: {}", response.cancel_reason())));
            }
            self.take_in(&response);
        }
    }

    fn take_in(&mut self, response: &WatchResponse) {
        for present in response.events().iter().filter_map(|event| event.kv()) {
            tell(self.members.apply(&self.prefix, stored(present)));
        }
        self.show();
    }

    /// Ends the hold on vanished records when its time has come.
    fn let_go(&mut self) {
        if self.held_until.is_some_and(|until| Instant::now() >= until) {
            self.held_until = None;
            if self.members.release() {
                self.show();
            }
        }
    }

    fn show(&self) {
        let records = self.members.records();
        self.source.modify(|shown| {
            let differs = *shown != records;
            *shown = records;
            differs
        });
    }
}

/// A key as [`Members`] takes it. A removed key has version 0, a written one at least 1.
fn stored(present: &KeyValue) -> Stored {
    Stored {
        key: String::from_utf8_lossy(present.key()).into_owned(),
        revision: present.mod_revision(),
        value: (present.version() > 0).then(|| present.value().to_vec()),
    }
}

fn tell(malformed: impl IntoIterator<Item = Malformed>) {
    for Malformed { key, reason } in malformed {
        tracing::warn!(key, reason, "skipping a value that is no record of a replica");
    }
}
