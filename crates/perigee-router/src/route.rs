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

/// Chooses among reports. What a choice compares lies in columns, of which processors take several rows at once: a choice among
/// a thousand replicas is then over before anything interrupts it. Rows in which something is short or not known are looked
/// at one by one, by their reports.
#[derive(Debug, Default)]
pub(crate) struct Chooser {
    /// Expected milliseconds before the request's own tokens, and for each of those; 0 in idle rows.
    base_ms: Vec<f32>,
    token_ms: Vec<f32>,
    /// 1 where a row is idle, and takes the best time of a token that any row shows.
    is_idle: Vec<f32>,
    /// Most prompt tokens of a request of one session for which the times hold; less than none where a row is to be looked at.
    room: Vec<i32>,
    /// Sessions that run and wait.
    sessions: Vec<i32>,
    /// Measured times, as bits: those of positive numbers are in the numbers' order.
    decode_bits: Vec<i32>,
    token_bits: Vec<i32>,
    /// Bits of the expected time of the request at hand.
    times: Vec<i32>,
}

/// Of a row that is to be looked at, or that is not to be chosen: more than any time's bits.
const NEVER: i32 = i32::MAX;

/// The bits of a time, in the times' order.
fn bits(ms: f32) -> i32 {
    if ms.is_finite() { ms.max(0.0).to_bits() as i32 } else { NEVER - 1 }
}

fn clamped(count: u64) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}

fn least(values: &[i32]) -> i32 {
    values.iter().fold(NEVER, |least, &value| least.min(value))
}

impl Chooser {
    /// A chooser among so many, none of which has a report.
    pub(crate) fn of(count: usize) -> Self {
        let mut chooser = Self::default();
        let Self { base_ms, token_ms, is_idle, .. } = &mut chooser;
        [base_ms, token_ms, is_idle].into_iter().for_each(|column| column.resize(count, 0.0));
        let Self { room, sessions, decode_bits, token_bits, times, .. } = &mut chooser;
        [room, sessions, decode_bits, token_bits, times].into_iter().for_each(|column| column.resize(count, NEVER));
        (0..count).for_each(|index| chooser.set(index, None));
        chooser
    }

    /// Takes in what a replica reports now; none where it takes no requests.
    pub(crate) fn set(&mut self, index: usize, report: Option<Report>) {
        if index >= self.times.len() {
            return;
        }
        let measured = |ms: f64| if ms > 0.0 { bits(ms as f32) } else { NEVER };
        let Some(report) = report else {
            self.room[index] = -1;
            (self.decode_bits[index], self.token_bits[index]) = (NEVER, NEVER);
            return;
        };
        let sessions = report.running + report.waiting;
        let has_own = sessions > 0 && report.decode_ms > 0.0 && report.prompt_token_ms > 0.0;
        let is_idle = sessions == 0 && report.queued_tokens == 0;
        let has_slot = report.slots_free > report.waiting;
        // Beside the pages of what waits, and one for what is generated.
        let taken_pages = report.queued_tokens.div_ceil(PAGE_TOKENS) + 1;
        let in_pages = report.pages_free.checked_sub(taken_pages).map(|pages| pages.saturating_mul(PAGE_TOKENS));
        // With none that decode, tokens share their steps with nobody.
        let in_step =
            if report.running == 0 { Some(u64::MAX) } else { report.step_tokens.checked_sub(report.queued_tokens) };
        self.room[index] = match (in_pages, in_step) {
            (Some(in_pages), Some(in_step)) if has_slot && (has_own || is_idle) => clamped(in_pages.min(in_step)),
            _ => -1,
        };
        let shared_ms = if report.running == 0 { 0.0 } else { report.decode_ms };
        let base_ms = float(report.queued_tokens) * report.prompt_token_ms + shared_ms;
        let own = |ms: f64| if is_idle { 0.0 } else { ms as f32 };
        (self.base_ms[index], self.token_ms[index]) = (own(base_ms), own(report.prompt_token_ms));
        self.is_idle[index] = f32::from(u8::from(is_idle));
        self.sessions[index] = clamped(sessions);
        (self.decode_bits[index], self.token_bits[index]) =
            (measured(report.decode_ms), measured(report.prompt_token_ms));
    }

    /// Of the replicas with a report, one with nearly the least expected time: that with fewest sessions, then the least
    /// time, then the first. `report` has what a row was last set to, or none where it is not to be chosen.
    pub(crate) fn choose(
        &mut self,
        report: impl Fn(usize) -> Option<Report>,
        demand: Demand,
    ) -> Option<(usize, Report)> {
        // An idle replica's times are those of its last load, whatever that was, and one that has done nothing yet has none:
        // both take the best that anybody shows, so that they are tried and measured again.
        let best = |column: &[i32]| match least(column) {
            NEVER => None,
            best => Some(f32::from_bits(best as u32)),
        };
        let best_token = best(&self.token_bits);
        if self.reckon(demand, best_token.unwrap_or(UNKNOWN_TOKEN_MS as f32)) {
            let best_decode = best(&self.decode_bits);
            for index in 0..self.times.len() {
                if self.times[index] == NEVER
                    && let Some(report) = report(index)
                {
                    let is_idle = report.running + report.waiting == 0;
                    let or_best = |own: f64, best: Option<f32>| match best {
                        Some(best) if is_idle || own <= 0.0 => f64::from(best),
                        _ => own,
                    };
                    let decode_ms = or_best(report.decode_ms, best_decode);
                    let prompt_token_ms = or_best(report.prompt_token_ms, best_token);
                    let report = Report { decode_ms, prompt_token_ms, ..report };
                    self.times[index] = bits(expected_ms(&report, demand) as f32);
                }
            }
        }
        loop {
            let index = self.best()?;
            if let Some(report) = report(index) {
                return Some((index, report));
            }
            self.times[index] = NEVER;
        }
    }

    /// Writes the time of a request at every row that has room for it; true where there are others. Requests of several
    /// sessions are few, and have every row looked at.
    fn reckon(&mut self, demand: Demand, best_token: f32) -> bool {
        let tokens = if demand.sessions == 1 { clamped(demand.prompt_tokens) } else { NEVER };
        let prompt = tokens as f32;
        let rows = self.base_ms.iter().zip(&self.token_ms).zip(&self.is_idle).zip(&self.room);
        let mut others = 0;
        for (time, (((base, token), idle), room)) in self.times.iter_mut().zip(rows) {
            let ms = base + prompt * (token + idle * best_token);
            let has_room = tokens <= *room && tokens != NEVER;
            *time = if has_room { ms.to_bits() as i32 } else { NEVER };
            others |= i32::from(!has_room);
        }
        others != 0
    }

    /// The row to choose by its time and sessions.
    fn best(&self) -> Option<usize> {
        let first = least(&self.times);
        if first == NEVER {
            return None;
        }
        let near = bits((f64::from(f32::from_bits(first as u32)) * NEARLY) as f32).max(first);
        let rows = || self.times.iter().zip(&self.sessions);
        let among = |(time, sessions): (&i32, &i32)| if *time <= near { *sessions } else { NEVER };
        let fewest = rows().map(among).fold(NEVER, i32::min);
        let of_those = |(time, sessions): (&i32, &i32)| if *sessions == fewest { *time } else { NEVER };
        let soonest = rows().map(of_those).fold(NEVER, i32::min);
        rows().position(|(time, sessions)| *time == soonest && *sessions == fewest)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

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
        choose_open(&reports.iter().copied().map(Some).collect::<Vec<_>>(), demand)
    }

    fn choose_open(reports: &[Option<Report>], demand: Demand) -> Option<usize> {
        let mut chooser = Chooser::of(reports.len());
        // What a row was before leaves nothing behind.
        for before in [Some(BUSY), None, Some(Report { slots_free: 0, ..IDLE })] {
            (0..reports.len()).for_each(|index| chooser.set(index, before));
        }
        reports.iter().enumerate().for_each(|(index, report)| chooser.set(index, *report));
        let report = |index: usize| reports.get(index).copied().flatten();
        let chosen = chooser.choose(report, demand).map(|(index, _)| index);
        assert_eq!(chooser.choose(report, demand).map(|(index, _)| index), chosen, "a choice changes nothing");
        chosen
    }

    fn report() -> impl Strategy<Value = Report> {
        let times = (0..4_u32, 0..4_u32, prop_oneof![Just(0), Just(512), Just(8192)]);
        let counts = (prop_oneof![Just(0), 0..20_000_u64], 0..4_u64, 0..3_u64, 0..6_u64, 0..400_u64);
        (times, counts).prop_map(
            |((decode, token, step_tokens), (queued_tokens, running, waiting, slots_free, pages))| Report {
                decode_ms: f64::from(decode * 5),
                prompt_token_ms: f64::from(token) / 64.0,
                step_tokens,
                queued_tokens,
                running,
                waiting,
                slots_free,
                pages_free: pages,
            },
        )
    }

    proptest! {
        #[test]
        fn the_choice_is_one_that_comparing_all_one_by_one_could_make(
            reports in proptest::collection::vec(proptest::option::weighted(0.9, report()), 0..40),
            prompt_tokens in prop_oneof![0..100_u64, 0..30_000_u64],
            sessions in 1..4_u64,
        ) {
            let demand = Demand { prompt_tokens, sessions };
            let open = || reports.iter().flatten();
            let best = |times: Vec<f64>| times.into_iter().filter(|time| *time > 0.0).reduce(f64::min).unwrap_or(0.0);
            let best_decode = best(open().map(|report| report.decode_ms).collect());
            let best_token = best(open().map(|report| report.prompt_token_ms).collect());
            let rows: Vec<Option<(u64, f64)>> = reports.iter().map(|report| {
                let report = (*report)?;
                let sessions = report.running + report.waiting;
                let or_best = |own: f64, best: f64| if sessions == 0 || own == 0.0 { best } else { own };
                let decode_ms = or_best(report.decode_ms, best_decode);
                let prompt_token_ms = or_best(report.prompt_token_ms, best_token);
                Some((sessions, expected_ms(&Report { decode_ms, prompt_token_ms, ..report }, demand)))
            }).collect();
            let chosen = choose_open(&reports, demand);
            prop_assert_eq!(chosen.is_some(), rows.iter().any(Option::is_some));
            if let Some(chosen) = chosen {
                let (sessions, ms) = rows[chosen].expect("an open row");
                // Columns have half the precision of what this computes.
                let (less, more) = (1.0 - 1e-5, 1.0 + 1e-5);
                let near = rows.iter().flatten().map(|(_, ms)| *ms).fold(f64::INFINITY, f64::min) * NEARLY;
                prop_assert!(ms <= near * more);
                for (others, time) in rows.iter().flatten().filter(|(_, time)| *time <= near * less) {
                    prop_assert!(sessions < *others || sessions == *others && ms <= time * more);
                }
            }
        }
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
