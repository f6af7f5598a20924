//! The router against replicas that a test scripts: real gRPC over in-memory connections, and a clock that only moves
//! when everybody waits.

mod broken;
mod calls;
mod fake;
mod streams;
