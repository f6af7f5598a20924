//! The one binary of Perigee: subcommands, and nothing else.
fn main() {}
