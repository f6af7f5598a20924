//! Load tests of servers that stream tokens: what is asked when, how long the answers take, and the report. It speaks
//! `perigee.v1` and the OpenAI-compatible HTTP API, and knows nothing of what is behind either.
//!
//! A run's way: `scenario` (a file) → `plan` (conversations, from `arrivals`, `lengths`, `trace` and a seed) → `driver` (who
//! sends when) → `target` (one request) → `record` (what one request came to) → `tally` (histograms and a timeline) →
//! `report` (JSON, a table, a page) → `thresholds`.

mod arrivals;
mod dialogue;
mod driver;
mod error;
mod lengths;
mod plan;
mod progress;
mod record;
pub mod report;
mod scenario;
mod spread;
pub mod stub;
mod tally;
pub mod target;
mod thresholds;
mod trace;

pub use dialogue::{Dialogue, Message, Segment};
pub use driver::{Pace, run};
pub use error::LoadError;
pub use plan::{Conversation, Plan, Turn};
pub use progress::{Progress, Snapshot};
pub use record::{Ending, Move, Outcome, Piece};
pub use report::Report;
pub use scenario::{Arrivals, Cancel, Length, Limits, Prefixes, Scenario, Slo, Thresholds, Turns};
pub use tally::Tally;

#[cfg(test)]
mod tests;
