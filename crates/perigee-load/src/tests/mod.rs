//! Whole runs under a virtual clock, against servers whose times are known.

mod runs;
mod stub;
mod wire;
