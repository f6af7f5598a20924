//! A home's own time of a token while it answers. One process and one context of the device, so that what is measured is the
//! answers, not processes that take turns on a card.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use perigee_backend::{Backend, DType};
use perigee_engine::executor::{Executor, StepPlan};
use perigee_migration::QueryBatch;
use perigee_migration::attend::{HeadRange, QueryValues, SessionQuery};
use perigee_model::WeightSource;
use perigee_sampling::{Draw, SamplingParams, TokenCounts};

use super::replica::{CHUNK, Home, Outcome, PAGE, Replica, SESSION, Seat, fed, kept};

/// Tokens of the home's own session before its times are taken, and then.
const FIRST: u64 = 16;
const TIMED: u64 = 200;
/// Time between two questions of a session whose tokens take as long as they were seen to.
const PACE: Duration = Duration::from_millis(1);

/// Prints the home's token time for each context of the session that asks.
pub(crate) fn measure<B: Backend + 'static>(source: &WeightSource, contexts: &[u64], backend: B) -> Outcome<()> {
    let longest = contexts.iter().copied().max().unwrap_or_default();
    let own_pages = (4 * (FIRST + TIMED) + u64::from(CHUNK)).div_ceil(PAGE) as u32;
    let pages = longest.div_ceil(PAGE) as u32 + own_pages;
    let mut home = Replica::open(backend, source, pages as usize, None, true)?;
    let asked = Seat { slots: (0, 0), first: 0, pages: (own_pages..pages).collect(), remote: Default::default() };
    // Filled in, chunk by chunk; it only has to be there.
    let prompt: Vec<u32> = (0..longest / PAGE * PAGE).map(|at| (at % 251) as u32).collect();
    for (number, chunk) in prompt.chunks(CHUNK as usize).enumerate() {
        let plan = fed(&asked, u64::from(CHUNK) * number as u64, chunk);
        home.ranks.step(&StepPlan { clear_slots: if number == 0 { vec![0] } else { vec![] }, ..plan }, &[], false)?;
    }
    let answers = home.home()?;
    let mut own =
        Own { seat: Seat { slots: (1, 1), first: 0, pages: (0..own_pages).collect(), ..asked.clone() }, position: 0 };
    let plan = fed(&own.seat, 0, &prompt[..PAGE as usize]);
    home.ranks.step(&StepPlan { clear_slots: vec![1], ..plan }, &[], false)?;
    own.position = PAGE;
    let alone = own.tokens(&mut home)?;
    println!("a home's token, alone: {alone:.3} ms");
    for &context in contexts {
        let count = (context / PAGE) as usize;
        answers.directory.publish(SESSION, kept(&asked.pages[..count]), 2);
        for (how, pace) in [("a session that asks", PACE), ("questions without pause", Duration::ZERO)] {
            own.position = PAGE;
            let ended = AtomicBool::new(false);
            let (token, asked) = std::thread::scope(|scope| {
                let asking = scope.spawn(|| ask(&answers, context / PAGE * PAGE, pace, &ended));
                let token = own.tokens(&mut home);
                ended.store(true, Ordering::Relaxed);
                (token, asking.join().unwrap_or_default())
            });
            let (token, (count, latency)) = (token?, asked);
            println!(
                "context {context}, {how}: {token:.3} ms, {:.3} of alone; {count} answers, {latency:.0} us each",
                token / alone
            );
        }
    }
    Ok(())
}

/// The home's own session.
struct Own {
    seat: Seat,
    position: u64,
}

impl Own {
    /// Milliseconds of a token, the median, each step launched behind the one before.
    fn tokens<B: Backend>(&mut self, home: &mut Replica<B>) -> Outcome<f64> {
        let (params, counts) = (SamplingParams::greedy(), TokenCounts::default());
        let mut times = Vec::new();
        let mut last = Instant::now();
        for number in 0..=FIRST + TIMED {
            if number < FIRST + TIMED {
                let feed = if number == 0 { vec![] } else { vec![0] };
                let plan = StepPlan { feed, ..fed(&self.seat, self.position, &[1]) };
                self.position += 1;
                let draw = Draw {
                    params: &params,
                    choice: 0,
                    position: self.position,
                    counts: &counts,
                    banned: &[],
                    allowed: None,
                };
                home.ranks.launch(&plan, &[draw])?;
            }
            if number > 0 {
                home.ranks.collect()?;
                let now = Instant::now();
                if number > FIRST {
                    times.push((now - last).as_secs_f64() * 1e3);
                }
                last = now;
            }
        }
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }
}

/// Asks until that has ended, layer after layer; how often, and the mean microseconds of an answer.
fn ask(home: &Home, positions: u64, pace: Duration, ended: &AtomicBool) -> (usize, f64) {
    let Home { directory, reader, model } = home;
    let shape = model.shape;
    let width = shape.heads as usize * (shape.latent + shape.rope) as usize;
    let values: Vec<f32> = (0..width).map(|at| (at % 17) as f32 / 17.0 - 0.5).collect();
    let (mut count, mut time) = (0, Duration::ZERO);
    while !ended.load(Ordering::Relaxed) {
        let layer = count as u32 % shape.layers;
        let heads = HeadRange { layer, first_head: 0, heads: shape.heads, latent: shape.latent, rope: shape.rope };
        let query = SessionQuery {
            session: SESSION.into(),
            epoch: 2,
            ranges: std::iter::once(0..positions).collect(),
            tokens: 1,
            values: QueryValues::from_f32(&values, DType::Bf16),
        };
        let question = QueryBatch { heads, dtype: DType::Bf16, sessions: vec![query] };
        let Ok(message) = question.encode(&shape) else { break };
        let begun = Instant::now();
        if directory.answer(&**reader, model, &message).is_err() {
            break;
        }
        time += begun.elapsed();
        count += 1;
        std::thread::sleep(pace);
    }
    (count, time.as_secs_f64() * 1e6 / count.max(1) as f64)
}
