//! The router against replicas that a test scripts: real gRPC over in-memory connections, and a clock that only moves
//! when everybody waits.

mod actor;
mod balancing;
mod bodies;
mod broken;
mod calls;
mod connections;
mod evacuations;
mod fake;
mod http;
mod moves;
mod orders;
mod orphans;
mod replays;
mod scene;
mod streams;
mod turns;
mod walks;
