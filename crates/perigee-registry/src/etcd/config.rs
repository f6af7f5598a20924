//! Where etcd is, which keys are used there, and how patient to be. It reads the specification and nothing else.

use std::str::FromStr;
use std::time::Duration;

use crate::record::is_address;
use crate::{EtcdOptions, RegistryError};

/// etcd's usual port for clients.
const DEFAULT_PORT: u16 = 2379;

/// Settings of an etcd registry. Reads from `etcd://HOST:PORT,HOST:PORT[/PREFIX]`, with port 2379 and prefix `perigee`
/// where they are left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdConfig {
    /// The members of one etcd cluster, each host:port. Any that answers will do.
    pub endpoints: Vec<String>,
    /// Names one Perigee cluster among several in one etcd: keys are `/PREFIX/replicas/NAME`.
    pub prefix: String,
    /// How long a replica that stopped renewing its record stays in the cluster. At least 1 s; etcd may grant more.
    pub lease_ttl: Duration,
    /// How long a replica waits for its name while another incarnation has it: a predecessor that was killed leaves
    /// its record to the end of its lease.
    pub name_wait: Duration,
    /// How long etcd may take for one answer before another member is asked.
    pub call_timeout: Duration,
    /// Certificates and user; the files are read with every connection.
    pub access: EtcdOptions,
}

impl EtcdConfig {
    /// Settings for these members, each host:port, and defaults for the rest.
    pub fn new(endpoints: Vec<String>) -> Self {
        Self {
            endpoints,
            prefix: "perigee".to_owned(),
            lease_ttl: Duration::from_secs(10),
            name_wait: Duration::from_secs(15),
            call_timeout: Duration::from_secs(3),
            access: EtcdOptions::default(),
        }
    }

    /// Checks every field, and that the files for access can be read.
    ///
    /// # Errors
    /// [`RegistryError::Specification`] for the first bad one; [`RegistryError::Options`] and [`RegistryError::Read`] for
    /// access.
    pub fn validate(&self) -> Result<(), RegistryError> {
        if self.endpoints.is_empty() {
            return Err(self.invalid("it names no host"));
        }
        if let Some(bad) = self.endpoints.iter().find(|endpoint| !is_address(endpoint)) {
            return Err(self.invalid(format!("{bad:?} is not host:port")));
        }
        let named =
            |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if !self.prefix.split('/').all(named) {
            return Err(
                self.invalid("the prefix must be ASCII letters, digits, '-', '_', '.', with single '/' between")
            );
        }
        if self.lease_ttl < Duration::from_secs(1) || self.call_timeout.is_zero() {
            return Err(self.invalid("the lease must last at least 1 s, and an answer may take more than no time"));
        }
        self.access.secrets().map(drop)
    }

    fn invalid(&self, reason: impl Into<String>) -> RegistryError {
        let specification = format!("etcd://{}/{}", self.endpoints.join(","), self.prefix);
        RegistryError::Specification { specification, reason: reason.into() }
    }

    /// What the keys of all records begin with.
    pub(super) fn records(&self) -> String {
        format!("/{}/replicas/", self.prefix)
    }
}

impl FromStr for EtcdConfig {
    type Err = RegistryError;

    fn from_str(specification: &str) -> Result<Self, RegistryError> {
        let invalid = |reason: &str| RegistryError::Specification {
            specification: specification.to_owned(),
            reason: reason.to_owned(),
        };
        let rest = specification.strip_prefix("etcd://").ok_or_else(|| invalid("it does not begin with etcd://"))?;
        let (hosts, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if hosts.is_empty() {
            return Err(invalid("it names no host"));
        }
        let mut config = Self::new(hosts.split(',').map(with_port).collect());
        if !prefix.is_empty() {
            config.prefix = prefix.to_owned();
        }
        config.validate()?;
        Ok(config)
    }
}

/// The host with etcd's usual port where it has none; the colons of an IPv6 address in brackets are no port.
fn with_port(host: &str) -> String {
    let bare = host.ends_with(']') || !host.contains(':');
    if bare && !host.is_empty() { format!("{host}:{DEFAULT_PORT}") } else { host.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specifications_are_read() {
        for (specification, endpoints, records) in [
            ("etcd://h:1", vec!["h:1"], "/perigee/replicas/"),
            ("etcd://h:1/", vec!["h:1"], "/perigee/replicas/"),
            ("etcd://a,b:2", vec!["a:2379", "b:2"], "/perigee/replicas/"),
            ("etcd://[::1]/x", vec!["[::1]:2379"], "/x/replicas/"),
            ("etcd://[::1]:1/team/blue", vec!["[::1]:1"], "/team/blue/replicas/"),
        ] {
            let config: EtcdConfig = specification.parse().expect(specification);
            assert_eq!(config.endpoints, endpoints, "{specification}");
            assert_eq!(config.records(), records, "{specification}");
        }
    }

    #[test]
    fn bad_specifications_are_refused_with_a_reason() {
        for (specification, part) in [
            ("etcd:h:1", "etcd://"),
            ("etcd://", "no host"),
            ("etcd:///x", "no host"),
            ("etcd://h:1,", "host:port"),
            ("etcd://h:0", "host:port"),
            ("etcd://u@h:1", "host:port"),
            ("etcd://h:1//x", "prefix"),
            ("etcd://h:1/x/", "prefix"),
            ("etcd://h:1/x y", "prefix"),
        ] {
            let message = specification.parse::<EtcdConfig>().expect_err(specification).to_string();
            assert!(message.contains(part), "{specification}: {message:?} lacks {part:?}");
        }
        let config = EtcdConfig { lease_ttl: Duration::from_millis(900), ..EtcdConfig::new(vec!["h:1".to_owned()]) };
        assert!(config.validate().is_err());
    }
}
