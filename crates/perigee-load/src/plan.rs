//! All that a run will ask, drawn from the scenario's seed: each conversation is a function of (seed, number), so what is
//! asked does not depend on how fast answers come.

use std::time::Duration;

use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::arrivals::Times;
use crate::trace::{self, BLOCK_TOKENS, Recorded};
use crate::{Arrivals, LoadError, Scenario, Segment};

/// Streams of the generator, so that one kind of draw does not shift another.
const ARRIVALS: u64 = 0;
const FIRST_CONVERSATION: u64 = 1;

/// A conversation to hold.
#[derive(Debug, Clone, PartialEq)]
pub struct Conversation {
    /// Its number, from 0.
    pub number: usize,
    /// When it begins, from the start of the run; absent in a closed loop.
    pub at: Option<Duration>,
    /// Its turns.
    pub turns: Vec<Turn>,
    /// Pause before each turn but the first.
    pub think: Duration,
}

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// What is new in its prompt.
    pub prompt: Vec<Segment>,
    /// Tokens to generate.
    pub output: u32,
    /// Tokens after which it is given up.
    pub cancel_after: Option<u32>,
}

/// Conversations in the order of their numbers.
pub struct Plan {
    scenario: Scenario,
    times: Option<Times>,
    trace: Option<Vec<Recorded>>,
    next: usize,
}

impl Plan {
    /// Prepares a scenario; reads its trace.
    ///
    /// # Errors
    /// [`LoadError`] for a trace that cannot be read.
    pub fn new(scenario: &Scenario) -> Result<Self, LoadError> {
        let trace = match &scenario.arrivals {
            Arrivals::Trace { file, speed } => Some(trace::read(file, *speed)?),
            _ => None,
        };
        let times = Times::new(&scenario.arrivals, generator(scenario.seed, ARRIVALS));
        Ok(Self { scenario: scenario.clone(), times, trace, next: 0 })
    }

    fn conversation(&self, number: usize, at: Option<Duration>, recorded: Option<&Recorded>) -> Conversation {
        let scenario = &self.scenario;
        let mut random = generator(scenario.seed, FIRST_CONVERSATION + number as u64);
        let count = scenario.turns.as_ref().map_or(1, |turns| turns.count.draw(&mut random, 1));
        let turns = (0..count).map(|turn| {
            let mut prompt = Vec::new();
            if let (Some(prefixes), 0) = (&scenario.prefixes, turn) {
                let number = random.random_range(0..u64::from(prefixes.count));
                prompt.push(Segment { seed: shared(scenario.seed, number), tokens: prefixes.tokens });
            }
            let mut left = scenario.prompt.draw(&mut random, recorded.map_or(1, |request| request.input));
            for block in recorded.map_or(&[][..], |request| &request.blocks) {
                let tokens = left.min(BLOCK_TOKENS);
                left -= tokens;
                prompt.push(Segment { seed: shared(scenario.seed, *block), tokens });
            }
            prompt.push(Segment { seed: random.next_u64(), tokens: left });
            prompt.retain(|segment| segment.tokens > 0);
            let output = scenario.output.draw(&mut random, recorded.map_or(1, |request| request.output));
            let cancel_after = scenario.cancel.as_ref().and_then(|cancel| {
                let chosen = random.random_bool(cancel.share);
                let after = cancel.after.draw(&mut random, 1);
                chosen.then_some(after)
            });
            Turn { prompt, output, cancel_after }
        });
        let turns = turns.collect();
        let think = scenario.turns.as_ref().map_or(0.0, |turns| turns.think_s);
        Conversation { number, at, turns, think: Duration::from_secs_f64(think) }
    }
}

impl Iterator for Plan {
    type Item = Conversation;

    fn next(&mut self) -> Option<Conversation> {
        if self.scenario.conversations.is_some_and(|count| self.next >= count) {
            return None;
        }
        let recorded = match &self.trace {
            Some(trace) => Some(trace.get(self.next)?.clone()),
            None => None,
        };
        let at = match &mut self.times {
            Some(times) => Some(times.next()?),
            None => recorded.as_ref().map(|request| request.at),
        };
        if let (Some(at), Some(seconds)) = (at, self.scenario.duration_s)
            && at.as_secs_f64() >= seconds
        {
            return None;
        }
        let number = self.next;
        self.next += 1;
        Some(self.conversation(number, at, recorded.as_ref()))
    }
}

fn generator(seed: u64, stream: u64) -> ChaCha8Rng {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(stream);
    random
}

/// Seed of a segment that conversations share.
fn shared(seed: u64, number: u64) -> u64 {
    generator(seed ^ 0x7072_6566_6978, number).next_u64()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Cancel, Length, Prefixes, Turns};

    fn scenario(text: &str) -> Scenario {
        let common = "name = \"x\"\nprompt = { kind = \"uniform\", min = 5, max = 50 }\n\
                      output = { kind = \"uniform\", min = 1, max = 9 }\n";
        toml::from_str(&format!("{common}{text}")).expect("a scenario")
    }

    fn all(scenario: &Scenario) -> Vec<Conversation> {
        Plan::new(scenario).expect("a plan").collect()
    }

    #[test]
    fn the_seed_decides_everything_and_one_draw_shifts_no_other() {
        let mut one = scenario("conversations = 200\narrivals = { kind = \"poisson\", rate = 10.0 }");
        let first = all(&one);
        assert_eq!((first.len(), &first), (200, &all(&one)));
        let times = |plan: &[Conversation]| plan.iter().map(|conversation| conversation.at).collect::<Vec<_>>();
        one.output = Length::Fixed { tokens: 3 };
        assert_eq!(times(&first), times(&all(&one)));
        one.seed = 1;
        assert_ne!(times(&first), times(&all(&one)));
    }

    #[test]
    fn a_duration_ends_an_open_loop() {
        let plan = all(&scenario("duration_s = 20.0\narrivals = { kind = \"gamma\", rate = 50.0, cv = 1.5 }"));
        assert!((800..1200).contains(&plan.len()), "{}", plan.len());
        assert!(plan.iter().all(|conversation| conversation.at.is_some_and(|at| at.as_secs_f64() < 20.0)));
    }

    #[test]
    fn prefixes_turns_and_cancellations_are_as_asked() {
        let mut asked = scenario("conversations = 1000\narrivals = { kind = \"closed\", concurrency = 4 }");
        asked.prefixes = Some(Prefixes { count: 3, tokens: 64 });
        asked.turns = Some(Turns { count: Length::Fixed { tokens: 2 }, think_s: 0.5 });
        asked.cancel = Some(Cancel { share: 0.25, after: Length::Fixed { tokens: 2 } });
        let plan = all(&asked);
        let mut prefixes: Vec<u64> = plan.iter().map(|conversation| conversation.turns[0].prompt[0].seed).collect();
        prefixes.sort_unstable();
        prefixes.dedup();
        assert_eq!(prefixes.len(), 3);
        assert!(plan.iter().all(|conversation| conversation.turns.len() == 2 && conversation.at.is_none()));
        assert!(plan.iter().all(|conversation| conversation.turns[1].prompt.len() == 1), "a prefix comes once");
        let given_up =
            plan.iter().flat_map(|conversation| &conversation.turns).filter(|turn| turn.cancel_after.is_some());
        let given_up = given_up.count();
        assert!((420..580).contains(&given_up), "{given_up} of 2000");
    }

    #[test]
    fn a_trace_gives_times_lengths_and_shared_blocks() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let lines = "{\"timestamp\": 0, \"input_length\": 1300, \"output_length\": 5, \"hash_ids\": [4, 5, 6]}\n\
                     {\"timestamp\": 40, \"input_length\": 1300, \"output_length\": 7, \"hash_ids\": [4, 5, 9]}\n";
        std::fs::write(file.path(), lines).expect("written");
        let path = file.path().display();
        let mut asked = scenario(&format!("arrivals = {{ kind = \"trace\", file = \"{path}\" }}"));
        (asked.prompt, asked.output) = (Length::Trace, Length::Trace);
        assert_eq!(asked.faults(), Vec::<String>::new());
        let plan = all(&asked);
        let (one, other) = (&plan[0].turns[0], &plan[1].turns[0]);
        assert_eq!((one.prompt[..2].to_vec(), one.output, other.output), (other.prompt[..2].to_vec(), 5, 7));
        assert_ne!(one.prompt[2], other.prompt[2]);
        assert_eq!(one.prompt.iter().map(|segment| segment.tokens).collect::<Vec<_>>(), [512, 512, 276]);
        assert_eq!(plan[1].at, Some(Duration::from_millis(40)));
    }
}
