//! The engine of one replica: sessions in, token events out. The scheduler plans steps, the executor runs each one on
//! every rank, the sampler draws, and events leave by the handle. It knows no gRPC and no device.

pub mod executor;
pub mod request;
