//! One rank as a process; the leader also runs the replica's services.
