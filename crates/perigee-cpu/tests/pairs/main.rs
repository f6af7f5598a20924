//! Pairs between CPU backends, as threads of one process and as processes.

#[cfg(test)]
mod loopback;
