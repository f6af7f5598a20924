//! The watch over a group of ranks: a thread that makes a round through the host's connections every quarter of a second. A rank
//! whose process ended, or stopped, or whose communicator failed, ends the round on all others with an error that names it,
//! and the communicator is aborted. It sees processes, not devices: a device that hangs shows by the step's own timeout.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use perigee_backend::{BackendError, Result};
use perigee_collectives::Collective;

/// What is watched over: the device's side of the group.
pub(super) trait Watched: Send + Sync + 'static {
    /// A fault that it found by itself.
    fn fault(&self) -> Option<String>;
    /// Ends it; its users learn the reason.
    fn abort(&self, reason: &str);
}

/// Time between two rounds.
const BEAT: Duration = Duration::from_millis(250);
/// How long the other ranks may take to leave.
const LEAVING: Duration = Duration::from_secs(2);
/// How long a rank may be silent. Rounds need no device and hardly any processor, so only a stopped process takes longer.
const PATIENCE: Duration = Duration::from_millis(2500);

#[derive(Debug)]
pub(super) struct Watch {
    /// Dropped to end the thread.
    running: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Starts the watch with a first round that waits for all ranks, as long as the group allows.
    pub(super) fn start(mut group: Box<dyn Collective>, watched: Arc<impl Watched>) -> Result<Self> {
        group.or(&mut [0]).map_err(|error| BackendError::Collective(error.to_string()))?;
        group.set_patience(PATIENCE);
        let (running, ended) = channel();
        let thread = std::thread::Builder::new()
            .name("perigee-nccl".into())
            .spawn(move || watch(group, watched.as_ref(), &ended))
            .map_err(|error| BackendError::Collective(format!("starting the watch over the ranks: {error}")))?;
        Ok(Self { running: Some(running), thread: Some(thread) })
    }

    /// Leaves the group, when all ranks do or after a while.
    pub(super) fn leave(&mut self) {
        self.running = None;
        if let Some(thread) = self.thread.take() {
            // It does not panic, and there is nothing to do about it here if it did.
            let _ = thread.join();
        }
    }
}

/// Rounds until this rank leaves, then until all do. A round's bits are the ranks that leave.
fn watch(mut group: Box<dyn Collective>, watched: &impl Watched, ended: &Receiver<()>) {
    let (me, all) = (1u64 << group.rank(), group.size());
    let mut leaving: Option<Instant> = None;
    loop {
        if leaving.is_none() && ended.recv_timeout(BEAT) != Err(RecvTimeoutError::Timeout) {
            leaving = Some(Instant::now());
        }
        let mut ranks = [if leaving.is_some() { me } else { 0 }];
        let round = group.or(&mut ranks).map_err(|error| error.to_string());
        match leaving {
            Some(since) if round.is_err() || ranks[0].count_ones() as usize == all || since.elapsed() > LEAVING => {
                return;
            }
            Some(_) => {}
            None => {
                if let Some(reason) = round.err().or_else(|| watched.fault()) {
                    // Dropping the group next tells the other ranks.
                    watched.abort(&reason);
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use perigee_collectives::thread_group;

    use super::*;

    /// Remembers why it was aborted, and tells the waiting test.
    struct Side {
        fault: Option<&'static str>,
        aborted: Mutex<Sender<String>>,
    }

    impl Watched for Side {
        fn fault(&self) -> Option<String> {
            self.fault.map(str::to_owned)
        }

        fn abort(&self, reason: &str) {
            self.aborted.lock().unwrap().send(reason.to_owned()).unwrap();
        }
    }

    fn sides(faults: [Option<&'static str>; 2]) -> ([Watch; 2], [Receiver<String>; 2]) {
        let channels = [channel(), channel()];
        let starting = thread_group(2).into_iter().zip(faults).zip(&channels).map(|((group, fault), (sender, _))| {
            let side = Arc::new(Side { fault, aborted: Mutex::new(sender.clone()) });
            std::thread::spawn(move || Watch::start(Box::new(group), side).unwrap())
        });
        // All at once: each waits for the others' first round.
        let starting: Vec<_> = starting.collect();
        let watches: Vec<Watch> = starting.into_iter().map(|thread| thread.join().unwrap()).collect();
        let watches = watches.try_into().unwrap();
        (watches, channels.map(|(_, receiver)| receiver))
    }

    #[test]
    fn a_rank_that_leaves_ends_the_others_by_name() {
        let ([mut first, mut second], [aborted, quiet]) = sides([None, None]);
        second.leave();
        let reason = aborted.recv_timeout(Duration::from_secs(20)).unwrap();
        assert!(reason.contains("rank 1"), "{reason}");
        first.leave();
        assert!(quiet.try_recv().is_err(), "who leaves aborts nothing");
    }

    #[test]
    fn ranks_that_leave_together_abort_nothing() {
        let (watches, aborted) = sides([None, None]);
        let leaving = watches.map(|mut watch| std::thread::spawn(move || watch.leave()));
        leaving.into_iter().for_each(|thread| thread.join().unwrap());
        aborted.iter().for_each(|aborted| assert!(aborted.try_recv().is_err()));
    }

    #[test]
    fn a_fault_of_one_ends_both() {
        let (_watches, [first, second]) = sides([Some("broken"), None]);
        assert_eq!(first.recv_timeout(Duration::from_secs(20)).unwrap(), "broken");
        let reason = second.recv_timeout(Duration::from_secs(20)).unwrap();
        assert!(reason.contains("rank 0"), "{reason}");
    }
}
