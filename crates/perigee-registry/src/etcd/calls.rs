//! Calls to etcd: a client to one member after another, no call without a limit of time, and growing pauses between
//! failures. It knows keys and values, not what they mean.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::time::Duration;

use etcd_client::{Certificate, Client, ConnectOptions, GetOptions, Identity, KeyValue, TlsOptions};

use super::EtcdConfig;

/// Between two signs of life on an open stream; etcd refuses clients that ask more often than every 5 s.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// Keys in one answer to a listing.
const PAGE: i64 = 64;
/// Largest answer that is read: a page of the largest values that etcd takes (1.5 MiB), whoever wrote them.
const MAX_ANSWER: usize = 100 << 20;

/// Why a call to etcd led to nothing. All of these pass: the caller tries again.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    #[error("{0}")]
    Etcd(#[from] etcd_client::Error),
    #[error("no answer within {0:?}")]
    Silent(Duration),
    #[error("{0}")]
    Broken(String),
}

/// Waits for an answer, but not for ever.
pub(super) async fn within<T>(
    limit: Duration,
    call: impl Future<Output = Result<T, etcd_client::Error>>,
) -> Result<T, Trouble> {
    match tokio::time::timeout(limit, call).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(Trouble::Silent(limit)),
    }
}

/// Makes clients. Each goes to one member, so that a member that is away costs one failure and not every second call.
#[derive(Debug)]
pub(super) struct Connector {
    next: usize,
}

impl Connector {
    pub(super) fn new() -> Self {
        // Processes begin at different members.
        Self { next: random() as usize }
    }

    /// A client to the next member, with the certificates and password of now; it connects with its first call.
    pub(super) async fn client(&mut self, config: &EtcdConfig) -> Result<Client, Trouble> {
        let endpoint = &config.endpoints[self.next % config.endpoints.len()];
        self.next = self.next.wrapping_add(1);
        let secrets = config.access.secrets().map_err(|error| Trouble::Broken(error.to_string()))?;
        let mut options = ConnectOptions::new()
            .with_connect_timeout(config.call_timeout)
            .with_keep_alive(KEEP_ALIVE, config.call_timeout)
            // etcd takes signs of life without an open stream for abuse.
            .with_keep_alive_while_idle(false)
            .with_require_leader(true);
        if let Some(authority) = secrets.authority {
            let tls = TlsOptions::new().ca_certificate(Certificate::from_pem(authority));
            options = options.with_tls(match secrets.identity {
                Some((chain, key)) => tls.identity(Identity::from_pem(chain, key)),
                None => tls,
            });
        }
        if let Some((name, password)) = secrets.user {
            options = options.with_user(name, password);
        }
        // With a user, this asks etcd for a token.
        within(config.call_timeout, Client::connect([endpoint], Some(options))).await
    }
}

/// All keys that begin with `prefix`, which ends with '/', as of one revision, and that revision.
pub(super) async fn list(client: &Client, prefix: &str, limit: Duration) -> Result<(Vec<KeyValue>, i64), Trouble> {
    let mut values = client.kv_client().max_decoding_message_size(MAX_ANSWER);
    // '0' follows '/'.
    let end = format!("{}0", prefix.trim_end_matches('/'));
    let (mut from, mut revision, mut found) = (prefix.as_bytes().to_vec(), 0, Vec::new());
    loop {
        let options = GetOptions::new().with_range(end.as_str()).with_limit(PAGE).with_revision(revision);
        let mut answer = within(limit, values.get(from, Some(options))).await?;
        if revision == 0 {
            let header = answer.header().ok_or_else(|| Trouble::Broken("an answer without a revision".to_owned()))?;
            revision = header.revision();
        }
        let more = answer.more();
        found.extend(answer.take_kvs());
        match found.last() {
            // The smallest key after the last one.
            Some(last) if more => from = [last.key(), b"\0"].concat(),
            _ => return Ok((found, revision)),
        }
    }
}

/// Pauses that double from failure to failure, spread so that processes that lost etcd together do not return together.
#[derive(Debug)]
pub(super) struct Backoff {
    next: Duration,
    longest: Duration,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(100);

    pub(super) fn new(longest: Duration) -> Self {
        Self { next: Self::FIRST.min(longest), longest }
    }

    /// How long to pause after one more failure: between half and all of what it has grown to.
    pub(super) fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(self.longest);
        pause.mul_f64(0.5 + 0.5 * (random() >> 11) as f64 / (1u64 << 53) as f64)
    }

    pub(super) fn reset(&mut self) {
        self.next = Self::FIRST.min(self.longest);
    }
}

/// A number that differs between processes and calls. Nothing depends on its quality: it spreads load.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_begin_anew() {
        let mut backoff = Backoff::new(Duration::from_millis(500));
        for whole in [100, 200, 400, 500, 500] {
            let pause = backoff.pause();
            let (least, most) = (Duration::from_millis(whole / 2), Duration::from_millis(whole));
            assert!(pause >= least && pause <= most, "{pause:?} of {whole} ms");
        }
        backoff.reset();
        assert!(backoff.pause() <= Backoff::FIRST);
    }
}
