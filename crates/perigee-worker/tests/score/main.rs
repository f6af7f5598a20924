//! Score jobs over ranks that are threads: golden cases in every splitting, planted faults that the golden check must
//! notice, and odd shapes whose splittings must agree. Processes, sockets and the command line are tested beside the binary.

// Marked as tests for clippy, which lets only these unwrap.
#[cfg(test)]
mod faults;
#[cfg(test)]
mod filled;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod shapes;
