//! The integration tests of the collectives, as one binary: one conformance for all implementations, then what is
//! particular to threads, to sockets, to the rendezvous, and to real processes.

#[cfg(test)]
mod conformance;
#[cfg(test)]
mod encrypted;
#[cfg(test)]
mod processes;
#[cfg(test)]
mod rendezvous;
#[cfg(test)]
mod sockets;
#[cfg(test)]
mod threads;
