//! Keeps one record in etcd: a lease that is renewed three times in its life, and the record under it. It compares what
//! should be there with what is, and mends any difference: a lost lease, a removed or overwritten key, an update.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Client, Compare, CompareOp, Error, PutOptions, Txn, TxnOp, TxnOpResponse};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until};

use super::EtcdConfig;
use super::calls::{Backoff, Connector, Trouble, within};
use super::members::holder;
use crate::{RegistryError, ReplicaRecord};

/// Between two looks at a name that another incarnation has.
const NAME_POLL: Duration = Duration::from_millis(500);

/// A new content of the record.
pub(super) struct Change {
    pub(super) record: ReplicaRecord,
    /// The record as it is written.
    pub(super) value: Vec<u8>,
    /// Told once etcd has it, or cannot have it now.
    pub(super) done: oneshot::Sender<Result<(), RegistryError>>,
}

/// What etcd says of the record.
enum State {
    /// It is there, under this keeper's lease.
    Standing,
    /// Another incarnation's is there.
    Taken(String),
}

#[derive(Debug, Clone, Copy)]
struct Lease {
    id: i64,
    ttl: Duration,
}

/// One record and all that is needed to keep it.
pub(super) struct Keeper {
    config: Arc<EtcdConfig>,
    connector: Connector,
    client: Option<Client>,
    backoff: Backoff,
    lease: Option<Lease>,
    key: String,
    record: ReplicaRecord,
    value: Vec<u8>,
    /// The last attempt failed.
    away: bool,
    /// The last answer was that another incarnation has the name.
    taken: bool,
}

impl Keeper {
    pub(super) fn new(config: Arc<EtcdConfig>, record: ReplicaRecord, value: Vec<u8>) -> Self {
        Self {
            connector: Connector::new(),
            client: None,
            // Several attempts within a lease, however short.
            backoff: Backoff::new((config.lease_ttl / 6).min(Duration::from_secs(2))),
            lease: None,
            key: format!("{}{}", config.records(), record.replica),
            config,
            record,
            value,
            away: false,
            taken: false,
        }
    }

    /// Publishes, tells `published`, and keeps the record until `withdrawn` completes; then removes it.
    pub(super) async fn keep(
        mut self,
        changes: mpsc::Receiver<Change>,
        published: oneshot::Sender<Result<(), RegistryError>>,
        withdrawn: oneshot::Receiver<()>,
    ) {
        tokio::select! {
            () = self.stand(changes, published) => {}
            // The guard is dropped; nothing is ever sent.
            _ = withdrawn => {}
        }
        self.withdraw().await;
    }

    async fn stand(
        &mut self,
        mut changes: mpsc::Receiver<Change>,
        published: oneshot::Sender<Result<(), RegistryError>>,
    ) {
        let first = self.publish().await;
        let refused = first.is_err();
        // Nobody listens where the publishing was given up; then `withdrawn` completes.
        let _ = published.send(first);
        if refused {
            return;
        }
        let mut next = self.pause(true);
        loop {
            let done = tokio::select! {
                change = changes.recv() => match change {
                    Some(Change { record, value, done }) => {
                        (self.record, self.value) = (record, value);
                        Some(done)
                    }
                    None => return,
                },
                () = sleep_until(next) => None,
            };
            let state = self.settle().await;
            next = self.pause(matches!(state, Ok(State::Standing)));
            let result = match state {
                Ok(State::Standing) => Ok(()),
                Ok(State::Taken(incarnation)) => Err(self.name_taken(incarnation)),
                Err(trouble) => Err(self.unreachable(&trouble)),
            };
            if let Some(done) = done {
                // The caller may have stopped waiting.
                let _ = done.send(result);
            }
        }
    }

    /// Until the record stands for the first time. Only a name that stays taken ends the attempts.
    async fn publish(&mut self) -> Result<(), RegistryError> {
        let mut deadline = None;
        loop {
            match self.settle().await {
                Ok(State::Standing) => return Ok(()),
                Ok(State::Taken(incarnation)) => {
                    let now = Instant::now();
                    let deadline = *deadline.get_or_insert(now + self.config.name_wait);
                    if now >= deadline {
                        return Err(self.name_taken(incarnation));
                    }
                    sleep_until(deadline.min(now + NAME_POLL)).await;
                }
                Err(_) => sleep(self.backoff.pause()).await,
            }
        }
    }

    /// When to look again: well before the lease ends, or soon after a failure.
    fn pause(&mut self, standing: bool) -> Instant {
        let lease = self.lease.map_or(self.config.lease_ttl, |lease| lease.ttl);
        Instant::now() + if standing { lease / 3 } else { self.backoff.pause() }
    }

    /// One attempt to make etcd have the record under a live lease; says so once when that changes.
    async fn settle(&mut self) -> Result<State, Trouble> {
        let result = self.attempt().await;
        let replica = self.record.replica.as_str();
        match &result {
            Ok(_) if self.away => tracing::info!(replica, "etcd answers again"),
            Err(error) if !self.away => {
                tracing::warn!(replica, %error, "etcd is away; the replica's record is renewed when it answers");
            }
            _ => {}
        }
        match &result {
            Ok(State::Taken(incarnation)) if !self.taken => {
                tracing::warn!(
                    replica,
                    incarnation,
                    "another incarnation has this replica's name; waiting for it to leave"
                );
            }
            _ => {}
        }
        self.away = result.is_err();
        match &result {
            Ok(state) => {
                self.taken = matches!(state, State::Taken(_));
                self.backoff.reset();
            }
            // The next attempt goes to another member.
            Err(_) => self.client = None,
        }
        result
    }

    async fn attempt(&mut self) -> Result<State, Trouble> {
        let client = match &mut self.client {
            Some(client) => client,
            none => none.insert(self.connector.client(&self.config).await?),
        };
        let limit = self.config.call_timeout;
        if let Some(lease) = self.lease
            && !renew(client, lease, limit).await?
        {
            tracing::warn!(replica = self.record.replica, "the lease was lost; publishing again with a new one");
            self.lease = None;
        }
        let lease = match self.lease {
            Some(lease) => lease,
            None => *self.lease.insert(grant(client, self.config.lease_ttl, limit).await?),
        };
        self.claim(lease.id).await
    }

    /// Writes the record where it does not stand: over nothing, over an older one of this incarnation, or over what is no
    /// record of anybody. Each write is conditional on what was seen.
    async fn claim(&mut self, lease: i64) -> Result<State, Trouble> {
        let Some(client) = &mut self.client else { return Err(Trouble::Broken("not connected".to_owned())) };
        let (key, limit) = (self.key.as_str(), self.config.call_timeout);
        let standing = [
            Compare::lease(key, CompareOp::Equal, lease),
            Compare::value(key, CompareOp::Equal, self.value.as_slice()),
        ];
        let look = Txn::new().when(standing).or_else([TxnOp::get(key, None)]);
        let answer = within(limit, client.txn(look)).await?;
        if answer.succeeded() {
            return Ok(State::Standing);
        }
        let present = answer.op_responses().into_iter().find_map(|response| match response {
            TxnOpResponse::Get(mut found) => found.take_kvs().pop(),
            _ => None,
        });
        let unchanged = match present {
            None => Compare::create_revision(key, CompareOp::Equal, 0),
            Some(present) => {
                match holder(present.value()) {
                    Some(other) if other != self.record.incarnation => return Ok(State::Taken(other)),
                    Some(_) => {}
                    None => tracing::warn!(key, "replacing a value that is no record of a replica"),
                }
                Compare::mod_revision(key, CompareOp::Equal, present.mod_revision())
            }
        };
        let put = TxnOp::put(key, self.value.as_slice(), Some(PutOptions::new().with_lease(lease)));
        let answer = within(limit, client.txn(Txn::new().when([unchanged]).and_then([put]))).await?;
        if answer.succeeded() { Ok(State::Standing) } else { Err(Trouble::Broken("the key changes".to_owned())) }
    }

    /// Ends the lease, and with it the record; another incarnation's record is under another lease.
    async fn withdraw(mut self) {
        let Some(lease) = self.lease else { return };
        let revoked = async {
            let client = match &mut self.client {
                Some(client) => client,
                none => none.insert(self.connector.client(&self.config).await?),
            };
            within(self.config.call_timeout, client.lease_client().revoke(lease.id)).await
        };
        if let Err(error) = revoked.await {
            let replica = self.record.replica;
            tracing::warn!(replica, %error, "the replica's record could not be removed; it ends with its lease");
        }
    }

    fn name_taken(&self, incarnation: String) -> RegistryError {
        RegistryError::NameTaken { replica: self.record.replica.clone(), incarnation }
    }

    fn unreachable(&self, trouble: &Trouble) -> RegistryError {
        RegistryError::Unreachable { endpoints: self.config.endpoints.join(","), reason: trouble.to_string() }
    }
}

/// A new lease. etcd counts whole seconds, and may grant more than was asked for.
async fn grant(client: &Client, ttl: Duration, limit: Duration) -> Result<Lease, Trouble> {
    let seconds = i64::try_from(ttl.as_secs_f64().ceil() as u64).unwrap_or(i64::MAX);
    let granted = within(limit, client.lease_client().grant(seconds, None)).await?;
    let ttl = Duration::from_secs(granted.ttl().max(1).unsigned_abs());
    Ok(Lease { id: granted.id(), ttl })
}

/// Renews a lease; says whether it still was there. A stream for every renewal goes to whichever member answers, and
/// needs no care between two of them.
async fn renew(client: &Client, lease: Lease, limit: Duration) -> Result<bool, Trouble> {
    match within(limit, client.lease_client().keep_alive(lease.id)).await {
        Ok(_) => Ok(true),
        // So the client reports a lease that etcd does not know.
        Err(Trouble::Etcd(Error::LeaseKeepAliveError(_))) => Ok(false),
        Err(trouble) => Err(trouble),
    }
}
