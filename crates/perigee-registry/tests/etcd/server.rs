//! A real etcd of one member for a test: own folder, free ports, killed when the test ends. It can be killed and started
//! again in between, with its data or without.

use std::fs::File;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use etcd_client::Client;
use perigee_registry::EtcdConfig;

/// For whatever takes long only when something is wrong.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);

pub(crate) struct Etcd {
    folder: tempfile::TempDir,
    ports: [u16; 2],
    process: Option<Child>,
}

impl Etcd {
    /// Starts etcd and waits until it answers. `None`, after saying so, where etcd is not installed; in CI it must be.
    pub(crate) async fn start() -> Option<Self> {
        if Command::new("etcd").arg("--version").output().is_err() {
            let message = "not run: etcd is not installed (Debian: apt-get install etcd-server)";
            assert!(std::env::var_os("CI").is_none(), "{message}");
            use std::io::Write;
            // Past the capture of output, which hides what passing tests print.
            writeln!(std::io::stderr(), "{message}").expect("standard error");
            return None;
        }
        let folder = tempfile::tempdir().expect("a folder");
        let mut etcd = Self { folder, ports: [0; 2], process: None };
        // A free port may be somebody else's by the time etcd opens it.
        for _ in 0..5 {
            etcd.ports = free_ports();
            etcd.spawn();
            if etcd.answers().await {
                return Some(etcd);
            }
        }
        panic!("etcd does not start:\n{}", etcd.log());
    }

    /// Ends it as a crash would.
    pub(crate) fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            // It may have ended by itself.
            let _ = process.kill();
            process.wait().expect("etcd was ours to wait for");
        }
    }

    /// Starts it again at the same address, with what it had stored.
    pub(crate) async fn restart(&mut self) {
        self.kill();
        self.spawn();
        assert!(self.answers().await, "etcd does not start again:\n{}", self.log());
    }

    /// Removes what it had stored; only while it does not run.
    pub(crate) fn lose_data(&mut self) {
        assert!(self.process.is_none(), "etcd still runs");
        std::fs::remove_dir_all(self.data()).expect("its data");
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.ports[0])
    }

    /// A registry's settings with the shortest lease that etcd grants (2 s).
    pub(crate) fn config(&self) -> EtcdConfig {
        EtcdConfig { lease_ttl: Duration::from_secs(2), ..EtcdConfig::new(vec![self.endpoint()]) }
    }

    /// A client that uses nothing of the registry.
    pub(crate) async fn client(&self) -> Client {
        Client::connect([self.endpoint()], None).await.expect("a client")
    }

    fn spawn(&mut self) {
        let log = File::options().create(true).append(true).open(self.log_path()).expect("a log");
        let [client, peer] = self.ports.map(|port| format!("http://127.0.0.1:{port}"));
        let process = Command::new("etcd")
            .args(["--data-dir".into(), self.data()])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .env_remove("ETCD_DATA_DIR")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log)
            .spawn();
        self.process = Some(process.expect("etcd starts"));
    }

    /// Whether it comes to answer; not where it ends instead.
    async fn answers(&mut self) -> bool {
        let began = Instant::now();
        while began.elapsed() < DEADLINE {
            if self.process.as_mut().is_none_or(|process| process.try_wait().expect("a child").is_some()) {
                return false;
            }
            let answer = async { self.client().await.get("ready", None).await };
            if matches!(tokio::time::timeout(Duration::from_secs(2), answer).await, Ok(Ok(_))) {
                return true;
            }
            tokio::time::sleep(POLL).await;
        }
        false
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn log_path(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Two ports that were free just now.
fn free_ports() -> [u16; 2] {
    let listeners = [0; 2].map(|_| TcpListener::bind(("127.0.0.1", 0)).expect("a free port"));
    listeners.map(|listener| listener.local_addr().expect("its address").port())
}
