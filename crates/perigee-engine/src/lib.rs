//! The engine of one replica: scheduler, caches, step loop and ranks. It knows no gRPC.
