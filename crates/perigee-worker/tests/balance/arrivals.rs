//! Who comes when: now and then a request for many long choices, which begin on one replica because they share their
//! prompt, and short requests all the time, too few of them to even out what the long ones leave uneven.

use std::time::Duration;

use perigee_testkit::Numbers;

/// When the last request has come.
pub(crate) const END: Duration = Duration::from_secs(300);
/// Time between two requests for many choices, and how many each is for.
const PERIOD: Duration = Duration::from_secs(25);
const CHOICES: usize = 12;

/// A request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrival {
    pub(crate) at: Duration,
    pub(crate) prompt: usize,
    pub(crate) choices: usize,
    /// Tokens of each choice.
    pub(crate) output: u32,
}

/// The requests of a seed, in order of time.
pub(crate) fn skewed(seed: u64) -> Vec<Arrival> {
    let mut numbers = Numbers::new(seed);
    let mut all = Vec::new();
    let mut at = Duration::from_secs(5);
    while at < END {
        let (prompt, output) = (numbers.between(600, 1200), numbers.between(400, 900));
        all.push(Arrival { at, prompt, choices: CHOICES, output: output as u32 });
        at += PERIOD.mul_f64(numbers.between(60, 140) as f64 / 100.0);
    }
    at = Duration::ZERO;
    while at < END {
        let (prompt, output) = (numbers.between(100, 600), numbers.between(40, 160));
        all.push(Arrival { at, prompt, choices: 1, output: output as u32 });
        at += Duration::from_millis(numbers.between(100, 1500) as u64);
    }
    all.sort_by_key(|arrival| arrival.at);
    all
}
