//! Clusters as operators run them: real etcd, routers and ranks as processes of their own, and what befalls them. Few and
//! whole; what single parts do is tested beside them. Not run where etcd is not installed.

// Marked as tests for clippy, which lets only these unwrap.
#[cfg(test)]
mod deaths;
#[cfg(test)]
mod joins;
#[cfg(test)]
mod order;
#[cfg(test)]
mod outage;
#[cfg(test)]
mod parts;
#[cfg(test)]
mod probes;
#[cfg(test)]
mod streams;
#[cfg(test)]
mod tls;

use std::time::Duration;

/// How long anything may take that does not hang; nothing waits this long.
const PATIENCE: Duration = Duration::from_secs(90);
