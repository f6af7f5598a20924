//! The gRPC port, on h2 itself. A replica's step has a token for each of hundreds of streams, and a server of general purpose
//! keeps a task, a body and a buffer for each stream, which wait for memory at every token: together they cost more than all
//! else that a token takes. Here whoever takes a token in hands it to its connection (`outlet`); a stream's own task runs for
//! what begins and ends it, and while its client is slow.
//!
//! `server` accepts, `connection` drives one client's connection, `call` answers one call of it.

mod call;
mod connection;
mod outlet;
mod piece;
mod server;

pub(crate) use outlet::{Gone, Outlet};
pub(crate) use piece::Piece;
pub(crate) use server::GrpcServer;
