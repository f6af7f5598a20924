//! A real etcd of one member for a test: own folder, free ports, killed when the test ends. It can be killed and started
//! again in between, with its data or without. What is stored there is its users' business.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::certificates::{Authority, Identity};
use crate::sandbox::free_port;

/// How long it may take to answer; only an etcd that is broken takes this long.
const START: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);
/// How long one look at its health may take.
const LOOK: Duration = Duration::from_secs(2);

/// A running etcd.
pub struct Etcd {
    folder: TempDir,
    client: SocketAddr,
    peer: SocketAddr,
    health: SocketAddr,
    /// Scheme of the client port, and further options.
    scheme: &'static str,
    options: Vec<String>,
    process: Option<Child>,
}

impl Etcd {
    /// Starts one and waits until it answers. `None`, after saying so, where etcd is not installed; in CI it must be.
    ///
    /// # Panics
    /// It is installed and does not start.
    pub fn start() -> Option<Self> {
        Self::launch("http", Vec::new())
    }

    /// The same, but clients must show a certificate of `authority`; etcd's own is `identity`.
    ///
    /// # Panics
    /// As for [`Etcd::start`].
    pub fn start_with_tls(authority: &Authority, identity: &Identity) -> Option<Self> {
        let options = vec![
            format!("--cert-file={}", identity.certificate.display()),
            format!("--key-file={}", identity.key.display()),
            format!("--trusted-ca-file={}", authority.certificate.display()),
            "--client-cert-auth".to_owned(),
        ];
        Self::launch("https", options)
    }

    fn launch(scheme: &'static str, options: Vec<String>) -> Option<Self> {
        if Command::new("etcd").arg("--version").output().is_err() {
            let message = "not run: etcd is not installed (Debian: apt-get install etcd-server)";
            assert!(std::env::var_os("CI").is_none(), "{message}");
            // Past the capture of output, which hides what passing tests print; a closed one is nobody's loss.
            let _ = writeln!(std::io::stderr(), "{message}");
            return None;
        }
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let folder = must(tempfile::tempdir(), "a folder");
        let mut etcd = Self { folder, client: nowhere, peer: nowhere, health: nowhere, scheme, options, process: None };
        // A free port may be somebody else's by the time etcd opens it.
        for _ in 0..5 {
            for port in [&mut etcd.client, &mut etcd.peer, &mut etcd.health] {
                *port = must(free_port(), "a free port");
            }
            etcd.spawn();
            if etcd.answers() {
                return Some(etcd);
            }
        }
        panic!("etcd does not start:\n{}", etcd.log());
    }

    /// Ends it as a crash would.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            // It may have ended by itself.
            let _ = process.kill();
            must(process.wait(), "etcd was ours to wait for");
        }
    }

    /// Starts it again at the same address, with what it had stored.
    ///
    /// # Panics
    /// It does not start.
    pub fn restart(&mut self) {
        self.kill();
        self.spawn();
        assert!(self.answers(), "etcd does not start again:\n{}", self.log());
    }

    /// Removes what it had stored; only while it does not run.
    ///
    /// # Panics
    /// It runs.
    pub fn lose_data(&mut self) {
        assert!(self.process.is_none(), "etcd still runs");
        must(std::fs::remove_dir_all(self.data()), "its data");
    }

    /// Its address, host:port.
    pub fn endpoint(&self) -> String {
        self.client.to_string()
    }

    /// The option that names it as the registry.
    pub fn registry(&self) -> String {
        format!("--registry=etcd://{}", self.client)
    }

    fn spawn(&mut self) {
        let log = must(File::options().create(true).append(true).open(self.log_path()), "a log");
        let client = format!("{}://{}", self.scheme, self.client);
        let (peer, health) = (format!("http://{}", self.peer), format!("http://{}", self.health));
        // Where the test is killed, nothing is dropped: the kernel ends it with the thread that starts it, which is the test's.
        let process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "etcd"])
            .args(["--data-dir".into(), self.data()])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}"), "--listen-metrics-urls", &health])
            .args(&self.options)
            .env_remove("ETCD_DATA_DIR")
            .stdin(Stdio::null())
            .stdout(must(log.try_clone(), "a log"))
            .stderr(log)
            .spawn();
        self.process = Some(must(process, "etcd starts"));
    }

    /// Whether it comes to answer; not where it ends instead.
    fn answers(&mut self) -> bool {
        let began = Instant::now();
        while began.elapsed() < START {
            if self.process.as_mut().is_none_or(|process| must(process.try_wait(), "a child").is_some()) {
                return false;
            }
            if self.is_healthy().unwrap_or(false) {
                return true;
            }
            std::thread::sleep(POLL);
        }
        false
    }

    fn is_healthy(&self) -> std::io::Result<bool> {
        let mut stream = TcpStream::connect_timeout(&self.health, LOOK)?;
        stream.set_read_timeout(Some(LOOK))?;
        stream.write_all(b"GET /health HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer.contains(r#""health":"true""#))
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

/// What a test cannot go on without.
fn must<T, E: std::fmt::Debug>(result: Result<T, E>, what: &str) -> T {
    result.unwrap_or_else(|error| panic!("{what}: {error:?}"))
}
