//! A cluster of single processes: a router and every rank started by hand, which find each other by addresses and a
//! registry file, as under an operator's own supervisor.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Mutex, PoisonError};

use serde_json::json;
use tempfile::TempDir;

use super::{START, Started, path_text, process};
use crate::error::{Result, TestkitError};

/// Ports that the system does not hand out by itself, so that none is taken between its choice and its use.
const PORTS: std::ops::Range<u16> = 10_240..32_000;

/// What to start.
#[derive(Debug, Clone)]
pub struct PartsSpec {
    /// The binary under test.
    pub program: PathBuf,
    /// Model as `--model` takes it.
    pub model: String,
    /// Replicas.
    pub replicas: usize,
    /// Ranks of each.
    pub tp: usize,
}

/// Running processes.
pub struct Parts {
    /// The router's gRPC address.
    pub grpc: SocketAddr,
    /// The router.
    pub router: Started,
    /// The ranks of every replica, in order.
    pub ranks: Vec<Vec<Started>>,
    _folder: TempDir,
}

impl Parts {
    /// Starts every process; the replicas may still be loading after that.
    ///
    /// # Errors
    /// A process cannot be started, or the router does not say where it listens.
    pub fn start(spec: &PartsSpec) -> Result<Self> {
        let folder = process::folder()?;
        let registry = folder.path().join("registry.json");
        let internal = (0..spec.replicas).map(|_| free_port()).collect::<Result<Vec<_>>>()?;
        let listed = internal.iter().enumerate();
        let listed = listed.map(|(index, address)| json!({"replica": name(index), "internal": address.to_string()}));
        let listed = json!({"replicas": listed.collect::<Vec<_>>()}).to_string();
        std::fs::write(&registry, listed).map_err(TestkitError::file(&registry))?;
        let registry = format!("--registry=file:{}", path_text(&registry));

        let mut ranks = Vec::new();
        for (index, internal) in internal.iter().enumerate() {
            let leader = free_port()?;
            let replica = (0..spec.tp).map(|rank| {
                let mut command = Command::new(&spec.program);
                command.args(["worker", "--threads=1", &format!("--model={}", spec.model), &registry]);
                command.args([format!("--replica={}", name(index)), format!("--rank={rank}")]);
                command.args([format!("--tp={}", spec.tp), format!("--leader={leader}")]);
                command.arg(format!("--internal={internal}"));
                Started::spawn(&format!("{} rank {rank}", name(index)), command, folder.path())
            });
            ranks.push(replica.collect::<Result<Vec<_>>>()?);
        }
        let (grpc, router) = start_router(spec, &registry, folder.path())?;
        Ok(Self { grpc, router, ranks, _folder: folder })
    }
}

fn name(replica: usize) -> String {
    format!("replica-{replica}")
}

fn start_router(spec: &PartsSpec, registry: &str, folder: &Path) -> Result<(SocketAddr, Started)> {
    let mut command = Command::new(&spec.program);
    command.args(["router", "--listen=127.0.0.1:0", "--http=127.0.0.1:0", registry]);
    command.arg(format!("--model={}", spec.model));
    let mut router = Started::spawn("perigee router", command, folder)?;
    let line = router.first_line(START)?;
    Ok((router_address(&line)?, router))
}

/// The gRPC address that a router's first line names.
///
/// # Errors
/// It names none.
pub fn router_address(line: &str) -> Result<SocketAddr> {
    let address = line.split([' ', ',']).find_map(|word| word.parse().ok());
    address.ok_or_else(|| TestkitError::Process {
        what: "perigee router".into(),
        message: format!("no address in its first line {line:?}"),
    })
}

/// An address that nobody listens at and that no other test is given: this process keeps the UDP port of the same number to
/// its end, by which processes know which ones are taken. They begin to look at different ones.
///
/// # Errors
/// All are taken.
pub fn free_port() -> Result<SocketAddr> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    static GIVEN: Mutex<Vec<UdpSocket>> = Mutex::new(Vec::new());
    let own = (std::process::id() as usize).wrapping_mul(97);
    for _ in PORTS {
        let offset = own + usize::from(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = PORTS.start + (offset % PORTS.len()) as u16;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let Ok(given) = UdpSocket::bind(address) else { continue };
        if TcpListener::bind(address).is_ok() {
            GIVEN.lock().unwrap_or_else(PoisonError::into_inner).push(given);
            return Ok(address);
        }
    }
    Err(TestkitError::Process { what: "free port".into(), message: format!("every port of {PORTS:?} is taken") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_given_to_one_test_only() {
        let given = [free_port().unwrap(), free_port().unwrap()];
        assert_ne!(given[0], given[1]);
        for address in given {
            assert!(UdpSocket::bind(address).is_err(), "another process could be given it too");
            assert!(TcpListener::bind(address).is_ok(), "a program under test can open it");
        }
    }
}
