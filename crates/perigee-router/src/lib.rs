//! The front door: checks and encodes requests, places their sessions on replicas, and owns the clients' streams. It knows
//! no tensor and no engine; replicas are names, loads and events to it.
//!
//! A request's way, file by file: `service` → `validate`, `text`, `admission` → `relay` → `recovery` (sessions without an
//! owner) → `replicas`, `board`, `route` (which replica) → `attachment` → `replica_client` → the leader; its events return by `replica_client` →
//! `relay` → `driver` (whose they are) → `flight` (what is accepted) → `encoded` → `grpc` (the client's connection). What cannot
//! leave at once, and what is more than a token, goes by `buffer` → `reply`.
//!
//! HTTP's handlers (`http`) stand beside `service` and go the same way from `validate` on.
//!
//! A session's way to another replica: `cluster_service` → `migrate` (may it) → `driver` (perigee-migration's coordinator,
//! one for each `choice`; reports come back by `relay`, time by `timers`) → `transit` (what it came to). Beside operators,
//! `evacuate` and `balance` have sessions moved.

mod admission;
mod attachment;
mod balance;
mod batch;
mod board;
mod buffer;
mod choice;
mod cluster_service;
mod config;
mod drain;
mod driver;
mod encoded;
mod error;
mod evacuate;
mod flight;
mod front;
mod gather;
mod grpc;
mod http;
mod membership;
mod metrics;
mod migrate;
mod model;
mod orphans;
mod random;
mod readiness;
mod recovery;
mod relay;
mod replica_client;
mod replicas;
mod reply;
mod resume;
mod route;
mod serve;
mod service;
mod text;
mod timers;
mod trace;
mod transit;
mod validate;
mod wire;

pub use balance::Balance;
pub use config::{Limits, MoveTimes, RouterConfig};
pub use error::RouterError;
pub use random::Random;
pub use replica_client::{Connect, TcpConnector};
pub use resume::ResumeKey;
pub use serve::{Router, RouterListeners, RouterParts, serve};

#[cfg(test)]
mod tests;
