//! TLS over real sockets, with grpc.health.v1 as the service: who is let in by which listener, whom clients trust, what
//! changed files and dawdling clients do; HTTP's connections; and those between ranks. What the options mean on a command line is tested beside the binary.

// Marked as tests for clippy, which lets only these unwrap.
#[cfg(test)]
mod clients;
#[cfg(test)]
mod files;
#[cfg(test)]
mod http;
#[cfg(test)]
mod ranks;
#[cfg(test)]
mod server;
