//! What tests share: golden loader, comparison, sandbox cluster.
