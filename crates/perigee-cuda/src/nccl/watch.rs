//! The watch over a group of ranks: a thread that makes a round through the host's connections every quarter of a second. A rank
//! whose process ended, or stopped, or whose communicator failed, ends the round on all others with an error that names it,
//! and the communicator is aborted. It sees processes, not devices: a device that hangs shows by the step's own timeout.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use perigee_backend::{BackendError, Result};
use perigee_collectives::Collective;

use super::communicator::Communicator;

/// Time between two rounds.
const BEAT: Duration = Duration::from_millis(250);
/// How long a rank may be silent. Rounds need no device and hardly any processor, so only a stopped process takes longer.
const PATIENCE: Duration = Duration::from_secs(3);

#[derive(Debug)]
pub(super) struct Watch {
    /// Dropped to end the thread.
    running: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Starts the watch with a first round that waits for all ranks, as long as the group allows.
    pub(super) fn start(mut group: Box<dyn Collective>, communicator: Arc<Communicator>) -> Result<Self> {
        group.or(&mut [0]).map_err(|error| BackendError::Collective(error.to_string()))?;
        group.set_patience(PATIENCE);
        let (running, ended) = channel();
        let thread = std::thread::Builder::new()
            .name("perigee-nccl".into())
            .spawn(move || watch(group, &communicator, &ended))
            .map_err(|error| BackendError::Collective(format!("starting the watch over the ranks: {error}")))?;
        Ok(Self { running: Some(running), thread: Some(thread) })
    }

    /// Ends the thread and leaves the group.
    pub(super) fn end(&mut self) {
        self.running = None;
        if let Some(thread) = self.thread.take() {
            // It does not panic, and there is nothing to do about it here if it did.
            let _ = thread.join();
        }
    }
}

fn watch(mut group: Box<dyn Collective>, communicator: &Communicator, ended: &Receiver<()>) {
    while ended.recv_timeout(BEAT) == Err(RecvTimeoutError::Timeout) {
        let round = group.or(&mut [0]).map_err(|error| error.to_string());
        if let Some(reason) = round.err().or_else(|| communicator.fault()) {
            // Dropping the group next tells the other ranks.
            communicator.abort(&reason);
            return;
        }
    }
}
