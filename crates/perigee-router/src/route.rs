//! Placement: where a request would have its first token soonest, by what the replicas last reported. Pure functions over
//! reports; who is attached and who is asked next is decided elsewhere.

/// Positions of a latent page.
const PAGE_TOKENS: u64 = 64;
/// How many steps a running session is taken to have left: only used to guess when a slot or page comes free.
const STEPS_LEFT: f64 = 128.0;
/// Expected times within this factor of the least count as equal: they are guesses over smoothed measurements, and equal
/// replicas must share the work rather than follow the noise.
const NEARLY: f64 = 1.25;
/// Times of a step and of a prompt token where no replica has measured any.
const UNKNOWN_STEP_MS: f64 = 1.0;
const UNKNOWN_TOKEN_MS: f64 = 0.01;

/// What a replica last reported, and what it was sent since.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Report {
    /// Smoothed time of a step that only decodes; 0 before the first one.
    pub(crate) decode_ms: f64,
    /// What each prompt token adds to a step; 0 before the first one.
    pub(crate) prompt_token_ms: f64,
    /// Most tokens in one step; 0 where not known.
    pub(crate) step_tokens: u64,
    /// Prompt tokens not yet prefilled, with those of requests sent since.
    pub(crate) queued_tokens: u64,
    /// Sessions in the batch.
    pub(crate) running: u64,
    /// Sessions that wait, with those sent since.
    pub(crate) waiting: u64,
    /// Free state slots.
    pub(crate) slots_free: u64,
    /// Free latent pages.
    pub(crate) pages_free: u64,
}

/// What a request needs before its first token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Demand {
    /// Tokens of its prompt.
    pub(crate) prompt_tokens: u64,
    /// Its choices.
    pub(crate) sessions: u64,
}

impl Report {
    fn slots_short(&self, demand: Demand) -> u64 {
        (self.waiting + demand.sessions).saturating_sub(self.slots_free)
    }

    fn pages_short(&self, demand: Demand) -> u64 {
        let waiting = self.queued_tokens.div_ceil(PAGE_TOKENS);
        (waiting + demand.pages()).saturating_sub(self.pages_free)
    }
}

impl Demand {
    fn pages(self) -> u64 {
        self.prompt_tokens.div_ceil(PAGE_TOKENS) + self.sessions
    }
}

/// A count, none of which has its highest bit set: processors convert signed numbers in one step.
fn float(count: u64) -> f64 {
    count as i64 as f64
}

/// Milliseconds until the first token: decode steps until there is room, then the prompts queued before and this one, whose
/// chunks share their steps with the rows that decode. What steps took on the whole says little: a replica that has just
/// read a long prompt is not slow, and one that has only decoded has not shown how fast it reads.
#[inline]
pub(crate) fn expected_ms(report: &Report, demand: Demand) -> f64 {
    let decode_ms = if report.decode_ms > 0.0 { report.decode_ms } else { UNKNOWN_STEP_MS };
    let token_ms = if report.prompt_token_ms > 0.0 { report.prompt_token_ms } else { UNKNOWN_TOKEN_MS };
    let queued = report.queued_tokens + demand.prompt_tokens;
    let tokens = float(queued);
    let shared_ms = if report.running == 0 {
        0.0
    } else if queued <= report.step_tokens {
        decode_ms
    } else {
        tokens / float(report.step_tokens.max(1)) * decode_ms
    };
    let first_ms = tokens * token_ms + shared_ms;
    let (slots_short, pages_short) = (report.slots_short(demand), report.pages_short(demand));
    // With room, which most of a thousand replicas have, nothing need be divided.
    if slots_short == 0 && pages_short == 0 {
        return first_ms;
    }

    // Slots come free at the rate at which running sessions end.
    let slot_steps = slots_short as f64 * STEPS_LEFT / report.running.max(1) as f64;
    // Pages come free with them; a session has as many as its share of what the batch holds, which is not reported, so
    // a session's worth of pages is taken to be this request's.
    let requests = pages_short as f64 / demand.pages().max(1) as f64;
    let page_steps = requests * STEPS_LEFT / report.running.max(1) as f64;

    first_ms + decode_ms * slot_steps.max(page_steps)
}

/// Chooses among reports, in memory that it keeps.
#[derive(Debug, Default)]
pub(crate) struct Chooser {
    rows: Vec<Row>,
}

/// What a choice looks at.
#[derive(Debug, Clone, Copy)]
struct Row {
    index: u32,
    sessions: u32,
    /// Expected time; of those that take the best that others show, not a number at first.
    ms: f64,
}

impl Row {
    fn is_before(&self, other: &Self) -> bool {
        self.sessions < other.sessions || self.sessions == other.sessions && self.ms < other.ms
    }
}

impl Chooser {
    /// Of `count` replicas, those with a report, one with nearly the least expected time: that with fewest sessions, then the
    /// least time, then the first.
    pub(crate) fn choose(
        &mut self,
        count: usize,
        report: impl Fn(usize) -> Option<Report>,
        demand: Demand,
    ) -> Option<(usize, Report)> {
        // An idle replica's times are those of its last load, whatever that was, and one that has done nothing yet has none:
        // both take the best that anybody shows, so that they are tried and measured again.
        let (mut best_decode, mut best_token) = (f64::INFINITY, f64::INFINITY);
        let less = |best: f64, time: f64| if time > 0.0 && time < best { time } else { best };
        let mut least = f64::INFINITY;
        let mut is_all = true;
        self.rows.clear();
        for index in 0..count {
            let Some(report) = report(index) else { continue };
            best_decode = less(best_decode, report.decode_ms);
            best_token = less(best_token, report.prompt_token_ms);
            let sessions = report.running + report.waiting;
            let has_own = sessions > 0 && report.decode_ms > 0.0 && report.prompt_token_ms > 0.0;
            let ms = if has_own { expected_ms(&report, demand) } else { f64::NAN };
            is_all &= has_own;
            least = if ms < least { ms } else { least };
            let sessions = u32::try_from(sessions).unwrap_or(u32::MAX);
            self.rows.push(Row { index: index as u32, sessions, ms });
        }
        if !is_all {
            let or_unknown = |best: f64| if best.is_finite() { best } else { 0.0 };
            let (best_decode, best_token) = (or_unknown(best_decode), or_unknown(best_token));
            for row in self.rows.iter_mut().filter(|row| row.ms.is_nan()) {
                let Some(report) = report(row.index as usize) else { continue };
                let or_best = |own: f64, best: f64| if row.sessions == 0 || own <= 0.0 { best } else { own };
                let decode_ms = or_best(report.decode_ms, best_decode);
                let prompt_token_ms = or_best(report.prompt_token_ms, best_token);
                row.ms = expected_ms(&Report { decode_ms, prompt_token_ms, ..report }, demand);
                least = if row.ms < least { row.ms } else { least };
            }
        }
        let near = least * NEARLY;
        let mut best: Option<&Row> = None;
        for row in self.rows.iter().filter(|row| row.ms <= near) {
            if best.is_none_or(|best| row.is_before(best)) {
                best = Some(row);
            }
        }
        let index = best?.index as usize;
        Some((index, report(index)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Report = Report {
        decode_ms: 10.0,
        prompt_token_ms: 0.02,
        step_tokens: 512,
        queued_tokens: 0,
        running: 0,
        waiting: 0,
        slots_free: 64,
        pages_free: 1024,
    };
    const SMALL: Demand = Demand { prompt_tokens: 100, sessions: 1 };

    /// It decodes for somebody.
    const BUSY: Report = Report { running: 1, ..IDLE };

    fn choose(reports: &[Report], demand: Demand) -> Option<usize> {
        let report = |index: usize| reports.get(index).copied();
        Chooser::default().choose(reports.len(), report, demand).map(|(index, _)| index)
    }

    #[test]
    fn prompts_take_their_tokens_and_where_others_decode_their_steps_too() {
        assert_eq!(expected_ms(&IDLE, SMALL), 2.0);
        assert_eq!(expected_ms(&IDLE, Demand { prompt_tokens: 5000, ..SMALL }), 100.0);
        assert_eq!(expected_ms(&Report { queued_tokens: 4900, ..IDLE }, SMALL), 100.0);
        assert_eq!(expected_ms(&BUSY, SMALL), 12.0);
        assert_eq!(expected_ms(&BUSY, Demand { prompt_tokens: 5120, ..SMALL }), 5120.0 * 0.02 + 100.0);
    }

    #[test]
    fn each_burden_alone_sends_the_request_elsewhere() {
        let burdened = [
            ("decoding", BUSY),
            ("queued prompts", Report { queued_tokens: 4096, ..IDLE }),
            ("no free slot", Report { running: 64, slots_free: 0, ..IDLE }),
            ("no free page", Report { running: 64, pages_free: 0, ..IDLE }),
            ("waiting sessions", Report { running: 64, waiting: 10, slots_free: 5, ..IDLE }),
            ("more sessions at equal time", Report { running: 8, ..IDLE }),
        ];
        for (what, report) in burdened {
            assert_eq!(choose(&[report, IDLE], SMALL), Some(1), "{what}");
            assert_eq!(choose(&[IDLE, report], SMALL), Some(0), "{what}");
        }
    }

    #[test]
    fn a_short_queue_on_a_slow_replica_beats_a_long_one_on_a_fast_replica() {
        let fast_but_full = Report { decode_ms: 5.0, prompt_token_ms: 0.01, queued_tokens: 100_000, ..BUSY };
        let slow = Report { decode_ms: 50.0, prompt_token_ms: 0.1, ..BUSY };
        assert_eq!(choose(&[fast_but_full, slow], SMALL), Some(1));
        assert_eq!(choose(&[fast_but_full, slow], Demand { prompt_tokens: 1_000_000, sessions: 1 }), Some(0));
    }

    #[test]
    fn slow_reading_counts_for_long_prompts_and_slow_decoding_for_short_ones() {
        let reads_slowly = Report { prompt_token_ms: 0.2, ..BUSY };
        let decodes_slowly = Report { decode_ms: 40.0, ..BUSY };
        assert_eq!(choose(&[reads_slowly, decodes_slowly], SMALL), Some(0));
        assert_eq!(choose(&[reads_slowly, decodes_slowly], Demand { prompt_tokens: 5000, sessions: 1 }), Some(1));
    }

    #[test]
    fn noise_in_the_times_does_not_pile_sessions_up() {
        let lucky = Report { decode_ms: 9.0, running: 10, ..IDLE };
        assert_eq!(choose(&[lucky, BUSY], SMALL), Some(1));
        let faster = Report { decode_ms: 5.0, ..lucky };
        assert_eq!(choose(&[faster, BUSY], SMALL), Some(0), "a real difference counts");
    }

    #[test]
    fn replicas_that_are_idle_or_new_are_tried_whatever_they_show() {
        let slow_once = Report { decode_ms: 500.0, prompt_token_ms: 50.0, ..IDLE };
        let new = Report { decode_ms: 0.0, prompt_token_ms: 0.0, ..IDLE };
        let busy = Report { decode_ms: 5.0, running: 3, ..IDLE };
        for other in [slow_once, new] {
            assert_eq!(choose(&[busy, other], SMALL), Some(1));
        }
        // It has decoded and never read a prompt of more than a token.
        let never_read = Report { decode_ms: 5.0, prompt_token_ms: 0.0, ..BUSY };
        assert_eq!(choose(&[busy, never_read], Demand { prompt_tokens: 50_000, sessions: 1 }), Some(1));
    }

    #[test]
    fn more_running_sessions_free_a_slot_sooner() {
        let few = Report { running: 2, slots_free: 0, ..IDLE };
        let many = Report { running: 64, slots_free: 0, ..IDLE };
        assert_eq!(choose(&[few, many], SMALL), Some(1));
    }

    #[test]
    fn nothing_is_chosen_from_nothing_and_unknowns_do_not_divide_by_zero() {
        assert_eq!(choose(&[], SMALL), None);
        let unknown = Report { decode_ms: 0.0, prompt_token_ms: 0.0, step_tokens: 0, ..IDLE };
        assert!(expected_ms(&unknown, Demand { prompt_tokens: 0, sessions: 0 }).is_finite());
        assert!(
            expected_ms(&Report { pages_free: 0, ..unknown }, Demand { prompt_tokens: 0, sessions: 1 }).is_finite()
        );
    }
}
