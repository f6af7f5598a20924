//! The one binary of Perigee. Its commands are in `perigee-cli`: the whole program is optimised at the level of this package, for
//! speed, and that one for size.

use std::process::ExitCode;

fn main() -> ExitCode {
    perigee_cli::main()
}
