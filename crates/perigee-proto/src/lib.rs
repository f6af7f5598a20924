//! The wire: generated gRPC code, the names of sessions and routers, and the one table from error kinds to gRPC codes.
//! It holds no behaviour; services live where their work is done.

pub mod codec;
pub mod ids;
pub mod standard;
pub mod status;

/// What clients and operators speak: `perigee.v1`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::unwrap_used)]
pub mod v1 {
    include!("generated/perigee.v1.rs");
}

/// What routers and replicas speak among themselves: `perigee.internal.v1`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::unwrap_used)]
pub mod internal {
    include!("generated/perigee.internal.v1.rs");
}

/// Encoded descriptors of all protos, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("generated/descriptor.bin");

/// Version of `perigee.internal.v1`. Routers and replicas of different versions refuse each other.
pub const PROTOCOL_VERSION: u32 = 4;
