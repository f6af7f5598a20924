//! Whole runs against servers whose times are known, most of them under a virtual clock.

mod grpc;
mod runs;
mod stub;
mod wire;
