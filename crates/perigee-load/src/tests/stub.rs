//! A server with known times, and the scenario that asks it.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use crate::target::{Ask, BoxFuture, Counts, Failure, Hear, Heard, Target};
use crate::{Pace, Plan, Progress, Report, Scenario, run};

/// Answers after `first` of a request's number, and then a token every `step`.
pub(super) struct Stub {
    pub(super) first: fn(usize) -> Duration,
    pub(super) step: Duration,
    /// Requests at once; the others wait. None for all.
    pub(super) room: Option<tokio::sync::Semaphore>,
    /// The number of the conversation that fails, and after how many tokens.
    pub(super) failing: fn(usize) -> Option<u32>,
}

impl Default for Stub {
    fn default() -> Self {
        let step = Duration::from_millis(10);
        Self { first: |_| Duration::from_millis(50), step, room: None, failing: |_| None }
    }
}

impl Target for Stub {
    fn ask<'a>(&'a self, ask: Ask<'a>, hear: Hear<'a>) -> BoxFuture<'a, Result<Counts, Failure>> {
        Box::pin(async move {
            let number = ask.name.split('-').nth(1).and_then(|number| number.parse().ok()).expect("a number");
            let _place = match &self.room {
                Some(room) => Some(room.acquire().await.expect("open")),
                None => None,
            };
            sleep((self.first)(number)).await;
            for token in 0..ask.max_tokens {
                if (self.failing)(number) == Some(token) {
                    return Err(Failure { code: "UNAVAILABLE".to_owned(), message: "it broke".to_owned() });
                }
                if token > 0 {
                    sleep(self.step).await;
                }
                // Half way, every tenth session goes on elsewhere.
                let is_moved = number.is_multiple_of(10) && token >= ask.max_tokens / 2;
                let (replica, epoch) = if is_moved { ("b", 2) } else { ("a", 1) };
                let heard = Heard { tokens: 1, ids: &[token], text: "x", replica, epoch };
                if hear(heard).is_break() {
                    return Ok(Counts::default());
                }
            }
            let prompt = ask.dialogue.token_ids(1000).len() as u64;
            Ok(Counts { prompt: Some(prompt), cached: Some(0), output: Some(u64::from(ask.max_tokens)) })
        })
    }

    fn describe(&self) -> String {
        "a stub".to_owned()
    }
}

/// Fixed lengths of 8 prompt and 5 output tokens, and what the text adds.
pub(super) fn scenario(text: &str) -> Scenario {
    let common =
        "name = \"stub\"\nprompt = { kind = \"fixed\", tokens = 8 }\noutput = { kind = \"fixed\", tokens = 5 }\n";
    let scenario: Scenario = toml::from_str(&format!("{common}{text}")).expect("a scenario");
    assert_eq!(scenario.faults(), Vec::<String>::new());
    scenario
}

pub(super) async fn report(scenario: &Scenario, stub: Stub) -> Report {
    let plan = Plan::new(scenario).expect("a plan");
    run(scenario, plan, Arc::new(stub), Arc::new(Progress::default()), Pace::Timer).await.report("a stub".to_owned())
}
