//! What a supervised worker tells its parent: one JSON object a line on standard output. Progress and logs go to standard
//! error.

use std::io::Write;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum WorkerEvent {
    /// The leader listens for the other ranks.
    Rendezvous {
        /// Where.
        leader: SocketAddr,
    },
    /// Layers loaded so far.
    Loading {
        /// This rank.
        rank: usize,
        /// Layers done.
        done: usize,
        /// All layers.
        all: usize,
    },
    /// The replica serves.
    Ready(Box<ReadyEvent>),
    /// A score job is done.
    Scored {
        /// Weight bytes of every rank.
        weight_bytes: Vec<u64>,
        /// Seconds of computing, loading apart.
        seconds: f64,
    },
}

/// A replica that serves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReadyEvent {
    /// Its name.
    pub replica: String,
    /// This start of it.
    pub incarnation: String,
    /// Public address.
    pub listen: SocketAddr,
    /// Internal address.
    pub internal: SocketAddr,
    /// HTTP address.
    pub http: SocketAddr,
    /// Ranks.
    pub tp: usize,
    /// Device.
    pub device: String,
    /// Model digest.
    pub digest: String,
    /// Process ids in rank order.
    pub pids: Vec<u32>,
    /// Weight bytes of every rank.
    pub weight_bytes: Vec<u64>,
    /// State slots.
    pub slots: usize,
    /// Latent pages.
    pub pages: usize,
    /// Longest session.
    pub max_model_len: usize,
}

/// Writes a line, if there is a parent to read it.
pub(crate) fn emit(supervised: bool, event: &WorkerEvent) {
    if !supervised {
        return;
    }
    if let Ok(line) = serde_json::to_string(event) {
        let mut out = std::io::stdout().lock();
        // A parent that is gone is noticed on standard input, not here.
        let _ = writeln!(out, "{line}");
        let _ = out.flush();
    }
}

/// Ends this process when standard input closes: the parent is gone, however it ended, and an orphan must not keep a device.
/// A signal on the parent's death (Linux's PR_SET_PDEATHSIG) would come when the thread ends that started this process.
pub fn end_with_parent() {
    let watch = std::thread::Builder::new().name("perigee-parent".into()).spawn(|| {
        let mut sink = [0u8; 256];
        let mut input = std::io::stdin().lock();
        while matches!(std::io::Read::read(&mut input, &mut sink), Ok(1..)) {}
        std::process::exit(0);
    });
    if watch.is_err() {
        tracing::warn!("no thread to watch the parent process; this process outlives it");
    }
}
