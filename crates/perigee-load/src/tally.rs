//! Adds up outcomes: distributions, counts, and what happened in each second. Requests that should have begun during the
//! warm-up are left out of everything but the timeline.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::report::{Bucket, Counted, Curves, Latencies, Mark, Report};
use crate::spread::{Spread, milliseconds};
use crate::{Ending, Outcome, Scenario, Slo};

/// Most buckets of a timeline; a longer run has wider ones.
const BUCKETS: usize = 600;
/// Most marks that a report keeps.
const MARKS: usize = 2000;
/// Most messages of failures that a report keeps, one for each code.
const MESSAGES: usize = 20;

/// What a run came to so far.
#[derive(Debug)]
pub struct Tally {
    scenario: Scenario,
    warmup: Duration,
    ttft: Spread,
    tpot: Spread,
    itl: Spread,
    e2e: Spread,
    lateness: Spread,
    counted: Counted,
    messages: BTreeMap<String, String>,
    /// End of the last counted request.
    end: Duration,
    seconds: Vec<Second>,
    marks: Vec<Mark>,
    marks_left_out: u64,
    /// Requests sent, whether they had an outcome or not.
    pub(crate) sent: u64,
    outcomes: u64,
}

#[derive(Debug, Clone, Default)]
struct Second {
    started: u64,
    ended: u64,
    failed: u64,
    tokens: u64,
    /// Times to first tokens that came in it, in milliseconds.
    ttft: Vec<f64>,
}

impl Tally {
    /// Nothing yet.
    pub fn new(scenario: &Scenario) -> Self {
        Self {
            warmup: Duration::from_secs_f64(scenario.warmup_s),
            scenario: scenario.clone(),
            ttft: Spread::default(),
            tpot: Spread::default(),
            itl: Spread::default(),
            e2e: Spread::default(),
            lateness: Spread::default(),
            counted: Counted::default(),
            messages: BTreeMap::new(),
            end: Duration::ZERO,
            seconds: Vec::new(),
            marks: Vec::new(),
            marks_left_out: 0,
            sent: 0,
            outcomes: 0,
        }
    }

    /// Takes in a request that ended.
    pub fn add(&mut self, outcome: &Outcome) {
        self.outcomes += 1;
        self.see(outcome);
        if outcome.intended >= self.warmup {
            self.count(outcome);
        }
    }

    fn second(&mut self, at: Duration) -> &mut Second {
        let index = at.as_secs() as usize;
        if self.seconds.len() <= index {
            self.seconds.resize(index + 1, Second::default());
        }
        &mut self.seconds[index]
    }

    /// Enters it into the timeline.
    fn see(&mut self, outcome: &Outcome) {
        self.second(outcome.intended).started += 1;
        for piece in &outcome.pieces {
            self.second(piece.at).tokens += u64::from(piece.tokens);
        }
        if let (Some(first), Some(ttft)) = (outcome.pieces.first(), outcome.ttft()) {
            self.second(first.at).ttft.push(milliseconds(ttft));
        }
        self.second(outcome.ended).ended += 1;
        let mut mark = |at: Duration, kind: &str, text: String| {
            if self.marks.len() < MARKS {
                self.marks.push(Mark { at_s: at.as_secs_f64(), kind: kind.to_owned(), text });
            } else {
                self.marks_left_out += 1;
            }
        };
        for moved in &outcome.moves {
            mark(moved.at, "move", format!("{} to {}", moved.from, moved.to));
        }
        if let Ending::Failed(failure) = &outcome.ending {
            mark(outcome.ended, "failure", format!("{}: {}", failure.code, failure.message));
            self.second(outcome.ended).failed += 1;
        }
    }

    fn count(&mut self, outcome: &Outcome) {
        let counted = &mut self.counted;
        counted.requests += 1;
        counted.moves += outcome.moves.len() as u64;
        counted.prompt_tokens += outcome.prompt_tokens;
        counted.cached_tokens += outcome.cached_tokens;
        counted.output_tokens += outcome.output_tokens;
        self.end = self.end.max(outcome.ended);
        self.lateness.add(outcome.sent.saturating_sub(outcome.intended));
        outcome.ttft().into_iter().for_each(|time| self.ttft.add(time));
        outcome.gaps().for_each(|time| self.itl.add(time));
        match &outcome.ending {
            Ending::Completed => {
                counted.completed += 1;
                counted.good += u64::from(is_good(&self.scenario.slo, outcome));
                outcome.tpot().into_iter().for_each(|time| self.tpot.add(time));
                self.e2e.add(outcome.e2e());
            }
            Ending::Cancelled => counted.cancelled += 1,
            Ending::Failed(failure) => {
                counted.failed += 1;
                *counted.failures.entry(failure.code.clone()).or_default() += 1;
                if self.messages.len() < MESSAGES {
                    self.messages.entry(failure.code.clone()).or_insert_with(|| failure.message.clone());
                }
            }
        }
    }

    /// What there is to say, about a server.
    pub fn report(mut self, target: String) -> Report {
        let seconds = self.end.saturating_sub(self.warmup).as_secs_f64();
        let rate = |count: u64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
        let counted = self.counted;
        // A request that the client itself gave up is neither good nor bad.
        let judged = counted.completed + counted.failed;
        let share = |part: u64| if judged > 0 { part as f64 / judged as f64 } else { 0.0 };
        self.marks.sort_by(|a, b| a.at_s.total_cmp(&b.at_s));
        Report {
            scenario: self.scenario,
            target,
            seconds,
            sent: self.sent,
            lost: self.sent.saturating_sub(self.outcomes),
            requests_s: rate(counted.completed),
            output_tok_s: rate(counted.output_tokens),
            prompt_tok_s: rate(counted.prompt_tokens),
            goodput_s: rate(counted.good),
            good_share: share(counted.good),
            failed_share: share(counted.failed),
            counted,
            messages: self.messages,
            latencies: Latencies {
                ttft_ms: self.ttft.summary(),
                tpot_ms: self.tpot.summary(),
                itl_ms: self.itl.summary(),
                e2e_ms: self.e2e.summary(),
                lateness_ms: self.lateness.summary(),
            },
            curves: Curves {
                ttft_ms: self.ttft.curve(),
                tpot_ms: self.tpot.curve(),
                itl_ms: self.itl.curve(),
                e2e_ms: self.e2e.curve(),
            },
            timeline: timeline(&self.seconds),
            marks: self.marks,
            marks_left_out: self.marks_left_out,
        }
    }
}

/// Whether a completed request kept all objectives. One without a token of which a time is asked did not.
fn is_good(slo: &Slo, outcome: &Outcome) -> bool {
    let within = |limit: Option<f64>, time: Option<Duration>| {
        limit.is_none_or(|limit| time.is_some_and(|time| milliseconds(time) <= limit))
    };
    let tpot = outcome.tpot().or(outcome.ttft().map(|_| Duration::ZERO));
    within(slo.ttft_ms, outcome.ttft()) && within(slo.tpot_ms, tpot) && within(slo.e2e_ms, Some(outcome.e2e()))
}

fn timeline(seconds: &[Second]) -> Vec<Bucket> {
    let width = seconds.len().div_ceil(BUCKETS).max(1);
    let mut running = 0;
    let bucket = |(index, group): (usize, &[Second])| {
        let sum = |of: fn(&Second) -> u64| group.iter().map(of).sum::<u64>();
        let mut ttft: Vec<f64> = group.iter().flat_map(|second| second.ttft.iter().copied()).collect();
        ttft.sort_by(f64::total_cmp);
        let at = |share: f64| ttft.get(((ttft.len() as f64 * share).ceil() as usize).saturating_sub(1)).copied();
        let (started, ended) = (sum(|second| second.started), sum(|second| second.ended));
        running += started;
        running -= ended.min(running);
        Bucket {
            from_s: (index * width) as f64,
            seconds: group.len() as f64,
            started,
            ended,
            failed: sum(|second| second.failed),
            running,
            tokens: sum(|second| second.tokens),
            ttft_p50_ms: at(0.5),
            ttft_p99_ms: at(0.99),
        }
    };
    seconds.chunks(width).enumerate().map(bucket).collect()
}
