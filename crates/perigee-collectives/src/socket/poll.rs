//! Waiting for sockets, with a time limit and without spinning. A thin wrapper over poll(2) that restarts after signals;
//! it decides nothing.

use std::time::{Duration, Instant};

use rustix::event::{PollFd, Timespec};
use rustix::io::Errno;

use crate::CollectiveError;

/// Waits until one of `sockets` has what it is polled for, or has failed, or `wait` is over; says whether one has.
pub(super) fn poll(sockets: &mut [PollFd<'_>], wait: Duration) -> Result<bool, CollectiveError> {
    let started = Instant::now();
    loop {
        let left = wait.saturating_sub(started.elapsed());
        // A wait too long for the system's clock type is as good as none.
        let timeout = Timespec::try_from(left).ok();
        match rustix::event::poll(sockets, timeout.as_ref()) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(CollectiveError::socket("wait for the other ranks")(errno.into())),
        }
    }
}
