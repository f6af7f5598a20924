//! The engine of one replica: sessions in, token events out. The scheduler plans steps, the executor runs each one on
//! every rank, the sampler draws, and events leave by the handle. It knows no gRPC and no device.

pub mod cache;
pub mod executor;
pub mod link;
pub mod protocol;
pub mod rank;
pub mod ranks;
pub mod request;
pub mod scheduler;
