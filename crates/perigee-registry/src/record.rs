//! What a replica publishes about itself. Records may come from a file that says little, so what is not known is empty and
//! learnt from the replica once a router is attached to it.

use serde::{Deserialize, Serialize};

use crate::RegistryError;

/// Where a replica is between its start and its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReplicaStatus {
    /// Its ranks meet.
    Forming,
    /// Its ranks load weights.
    Loading,
    /// Its ranks run a first step.
    Warming,
    /// It takes requests.
    Ready,
    /// It takes no more requests; running ones move away or end.
    Draining,
    /// It left.
    Gone,
    /// Something that only a later version of Perigee knows; this one keeps away from it.
    #[serde(other)]
    Unknown,
}

impl ReplicaStatus {
    /// Its name, as operators see it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Forming => "forming",
            Self::Loading => "loading",
            Self::Warming => "warming",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Gone => "gone",
            Self::Unknown => "unknown",
        }
    }

    /// Whether routers keep a stream to it: its running sessions are served.
    pub fn is_attachable(self) -> bool {
        matches!(self, Self::Ready | Self::Draining)
    }
}

/// One replica, as the cluster knows it. Fields that a later version adds are ignored when it is read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaRecord {
    /// Name, unique in the cluster: 1 to 255 ASCII letters, digits, `-`, `_` or `.`.
    pub replica: String,
    /// Changes with every start of the replica; empty where not known.
    #[serde(default)]
    pub incarnation: String,
    /// Address of the leader's Replica service, host:port; empty until there is one, before the replica is ready.
    pub internal: String,
    /// Address of the leader's public port, host:port; empty where not known.
    #[serde(default)]
    pub endpoint: String,
    /// Digest of the model's configuration and weights, in hexadecimal; empty where not known.
    #[serde(default)]
    pub digest: String,
    /// Number of ranks; 0 where not known.
    #[serde(default)]
    pub tp: u32,
    /// cpu or cuda; empty where not known.
    #[serde(default)]
    pub device: String,
    /// Where it is between its start and its end.
    #[serde(default = "ready")]
    pub status: ReplicaStatus,
    /// Process ids of the ranks, in rank order; empty where not known.
    #[serde(default)]
    pub pids: Vec<u32>,
    /// Bytes of weights on each rank, in rank order; empty where not known.
    #[serde(default)]
    pub weight_bytes: Vec<u64>,
}

fn ready() -> ReplicaStatus {
    ReplicaStatus::Ready
}

impl ReplicaRecord {
    /// A ready replica of which only name and internal address are known.
    pub fn new(replica: impl Into<String>, internal: impl Into<String>) -> Self {
        Self {
            replica: replica.into(),
            incarnation: String::new(),
            internal: internal.into(),
            endpoint: String::new(),
            digest: String::new(),
            tp: 0,
            device: String::new(),
            status: ReplicaStatus::Ready,
            pids: Vec::new(),
            weight_bytes: Vec::new(),
        }
    }

    /// Checks the fields that others use as names and addresses.
    ///
    /// # Errors
    /// [`RegistryError::InvalidRecord`] for the first field that has not the shape given there.
    pub fn validate(&self) -> Result<(), RegistryError> {
        let invalid = |field, rule, found: &str| RegistryError::InvalidRecord { field, rule, found: found.to_owned() };
        let named = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if self.replica.is_empty() || self.replica.len() > 255 || !self.replica.bytes().all(named) {
            let rule = "must be 1 to 255 ASCII letters, digits, '-', '_' or '.'";
            return Err(invalid("replica", rule, &self.replica));
        }
        let nowhere_yet = self.internal.is_empty() && !self.status.is_attachable();
        if !nowhere_yet && !is_address(&self.internal) {
            return Err(invalid("internal", "must be host:port", &self.internal));
        }
        if !self.endpoint.is_empty() && !is_address(&self.endpoint) {
            return Err(invalid("endpoint", "must be host:port or empty", &self.endpoint));
        }
        Ok(())
    }
}

/// host:port with a port above 0, and nothing that would make it another URL.
pub(crate) fn is_address(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let host_byte = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.[]:".contains(&byte);
    !host.is_empty() && host.bytes().all(host_byte) && port.parse::<u16>().is_ok_and(|port| port > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_later_versions_are_read() {
        let text = r#"{"replica": "a", "internal": "h:1", "status": "dreaming", "rack": {"row": 3}}"#;
        let record: ReplicaRecord = serde_json::from_str(text).expect("read");
        let expected = ReplicaRecord { status: ReplicaStatus::Unknown, ..ReplicaRecord::new("a", "h:1") };
        assert_eq!(record, expected);
        assert!(!record.status.is_attachable());
    }

    #[test]
    fn names_and_addresses_are_checked() {
        assert!(ReplicaRecord::new("replica-0", "127.0.0.1:7001").validate().is_ok());
        assert!(ReplicaRecord::new("a", "[::1]:7001").validate().is_ok());
        assert!(ReplicaRecord::new("a", "host.example:1").validate().is_ok());
        for (name, address) in [
            ("", "h:1"),
            ("a b", "h:1"),
            ("a/b", "h:1"),
            ("a", "h"),
            ("a", ":1"),
            ("a", "h:0"),
            ("a", "h:65536"),
            ("a", "user@h:1"),
            ("a", "h/path:1"),
        ] {
            assert!(ReplicaRecord::new(name, address).validate().is_err(), "{name:?} {address:?} passed");
        }
        let forming = ReplicaRecord { status: ReplicaStatus::Forming, ..ReplicaRecord::new("a", "") };
        assert!(forming.validate().is_ok(), "a replica that is not ready has no address yet");
        assert!(ReplicaRecord::new("a", "").validate().is_err(), "one that is ready has");
        let bad_endpoint = ReplicaRecord { endpoint: "x".to_owned(), ..ReplicaRecord::new("a", "h:1") };
        assert!(bad_endpoint.validate().is_err());
    }

    #[test]
    fn only_serving_replicas_are_attached() {
        use ReplicaStatus::{Draining, Forming, Gone, Loading, Ready, Unknown, Warming};
        let attachable: Vec<_> = [Forming, Loading, Warming, Ready, Draining, Gone, Unknown]
            .into_iter()
            .filter(|s| s.is_attachable())
            .collect();
        assert_eq!(attachable, [Ready, Draining]);
    }
}
