//! One rank as a process; the leader also runs the replica's services. From options to a loaded rank is this crate's
//! business, the step loop is the engine's.

mod addresses;
mod announce;
pub mod attend;
pub mod attention;
pub mod bench;
mod compile;
pub mod config;
mod convert;
mod device;
pub mod error;
pub mod events;
pub mod front;
pub mod group;
pub mod handoff;
pub mod identity;
mod lead;
mod lease;
mod leases;
pub mod links;
pub mod load;
pub mod memory;
pub mod metrics;
pub mod move_options;
mod move_report;
pub mod moving;
mod pace;
mod pages;
pub mod peers;
mod public;
pub mod run;
pub mod score;
pub mod serve;
mod service;
mod signals;
mod warm;

pub use config::{EngineOptions, WorkerConfig};
pub use device::Device;
pub use error::WorkerError;
pub use events::{ReadyEvent, WorkerEvent};
pub use identity::ReplicaIdentity;
pub use metrics::WorkerMetrics;
pub use move_options::MoveOptions;
pub use run::run;
