//! The wire: generated gRPC code, and the one table from error kinds to gRPC codes.
