//! Subcommands, one file each: arguments, and a `run` that does the work or starts the processes that do.

pub(crate) mod init_model;
pub(crate) mod score;
pub(crate) mod up;
