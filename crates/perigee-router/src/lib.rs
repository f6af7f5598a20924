//! The front door: checks and encodes requests, places their sessions on replicas, and owns the clients' streams. It knows
//! no tensor and no engine; replicas are names, loads and events to it.
//!
//! A request's way, file by file: `service` → `validate`, `text`, `admission` → `relay` → `route` (which replica) →
//! `attachment` → `replica_client` → the leader; its events return by `replica_client` → `relay` → `flight` (what is
//! accepted) → `buffer` → `reply`, which the client's connection polls.

mod admission;
mod attachment;
mod buffer;
mod cluster_service;
mod config;
mod error;
mod flight;
mod membership;
mod metrics;
mod model;
mod random;
mod relay;
mod replica_client;
mod replicas;
mod reply;
mod route;
mod serve;
mod service;
mod text;
mod validate;

pub use config::{Limits, RouterConfig};
pub use error::RouterError;
pub use random::Random;
pub use replica_client::{Connect, TcpConnector};
pub use serve::{Router, RouterListeners, RouterParts, serve};

#[cfg(test)]
mod tests;
