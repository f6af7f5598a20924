//! Addresses as other processes use them: what a replica publishes where it listens at all addresses of its machine, and
//! where its ranks meet by name. It opens no port.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::time::{Duration, Instant};

use crate::error::{Result, WorkerError};

/// Between two questions for a name that is not known yet: that of a process about to start, most likely.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// Where others reach a port that is open at `bound`: under the host that the operator named, else there.
pub(crate) fn published(advertise: Option<&str>, bound: SocketAddr) -> String {
    let Some(host) = advertise else { return bound.to_string() };
    match host.parse::<IpAddr>() {
        Ok(ip) => SocketAddr::new(ip, bound.port()).to_string(),
        Err(_) => format!("{host}:{}", bound.port()),
    }
}

/// What is wrong with a host to publish.
pub(crate) fn host_fault(host: &str) -> Option<String> {
    let named = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let is_name = !host.is_empty() && host.len() <= 253 && host.bytes().all(named);
    match host.parse::<IpAddr>() {
        Ok(ip) if ip.is_unspecified() => Some(format!("--advertise: nobody reaches {host}; name one host")),
        Ok(_) => None,
        Err(_) if is_name => None,
        Err(_) => Some(format!("--advertise: expected a host name or an IP address without a port, found {host:?}")),
    }
}

/// Host and port of an address by name.
pub(crate) fn host_and_port(address: &str) -> Option<(&str, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    Some((host.trim_start_matches('[').trim_end_matches(']'), port.parse().ok()?)).filter(|(host, _)| !host.is_empty())
}

/// Whether an address by name is a loopback one, as far as its look tells.
pub(crate) fn is_loopback(address: &str) -> bool {
    host_and_port(address)
        .is_some_and(|(host, _)| host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback()))
}

/// The address of a name, asked for until there is one.
///
/// # Errors
/// There is none before the deadline.
pub(crate) fn resolve(address: &str, deadline: Instant) -> Result<SocketAddr> {
    loop {
        let failed = match address.to_socket_addrs().map(|mut found| found.next()) {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => std::io::ErrorKind::NotFound.into(),
            Err(error) => error,
        };
        if Instant::now() + ASK_AGAIN > deadline {
            return Err(WorkerError::Io {
                what: format!("--leader: finding the address of {address}"),
                source: failed,
            });
        }
        std::thread::sleep(ASK_AGAIN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_host_is_published_with_the_port_that_is_open() {
        let bound: SocketAddr = "0.0.0.0:7001".parse().expect("an address");
        for (advertise, address) in [
            (None, "0.0.0.0:7001"),
            (Some("10.0.0.7"), "10.0.0.7:7001"),
            (Some("fd00::7"), "[fd00::7]:7001"),
            (Some("replica-0.cluster.local"), "replica-0.cluster.local:7001"),
        ] {
            assert_eq!(published(advertise, bound), address);
        }
        for good in ["10.0.0.7", "fd00::7", "replica-0.cluster.local"] {
            assert_eq!(host_fault(good), None);
        }
        for bad in ["", "0.0.0.0", "::", "host:1", "a b", "http://a"] {
            assert!(host_fault(bad).is_some_and(|fault| fault.starts_with("--advertise")), "{bad:?}");
        }
    }

    #[test]
    fn names_are_resolved_and_unknown_ones_told_at_the_deadline() {
        let found = resolve("localhost:7", Instant::now() + Duration::from_secs(10)).expect("every machine has it");
        assert!(found.ip().is_loopback() && found.port() == 7);
        let error = resolve("no-such-host.invalid:7", Instant::now()).expect_err("reserved for that").to_string();
        assert!(error.contains("no-such-host.invalid:7"), "{error}");
        for (address, here) in [("localhost:1", true), ("[::1]:1", true), ("127.0.0.2:1", true), ("leader:1", false)] {
            assert_eq!(is_loopback(address), here, "{address}");
        }
    }
}
