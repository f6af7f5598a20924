//! Tests of the handoff: what comes back, what is refused and how, a captured stream of this version.

mod capture;
mod faults;
mod harness;
mod held;
mod properties;
mod refusals;
